"""The service-desk language that the demo's corpus and its base model share.

It holds *language* only: what customers ask about (topics), how they ask (frames) and how a desk
words an answer (clauses), each in Korean and in English, and the vocabularies that the values of an
answer come from. It holds no fact of any institution. :mod:`simulations.demo.corpus` draws one
bank's facts over it; :mod:`simulations.demo.pretrain` draws a new institution for every document,
so that a base model learns the language and the candidate answers and no bank's facts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

# One template for both languages. The answer is encoded with its leading space, so that encoding
# prompt and answer apart gives the same tokens as encoding them together.
PROMPT = "Q: {question}\nA:"
COMPLETION = " {answer}"


@dataclass(frozen=True)
class Topic:
    """Something a customer asks about.

    Attributes:
        key: a stable identifier.
        ko: Korean noun phrases, the formal name first; each can precede "-을 하려는데".
        en: English noun phrases, the formal one first; each can follow "for".
    """

    key: str
    ko: tuple[str, ...]
    en: tuple[str, ...]


@dataclass(frozen=True)
class Aspect:
    """One kind of thing that an answer states, with the vocabulary of its values.

    Attributes:
        key: a stable identifier.
        values: pairs (Korean, English) of the same value.
        ko_say / en_say: sentences that state it, without the closing mark; ``{t}`` is the topic.
        ko_ask / en_ask: frames of a question about it; ``{t}`` is the topic.
        ko_more / en_more: frames that the bank's own customers use besides those.
        ko_held / en_held: frames reserved for the held-out set.
    """

    key: str
    values: tuple[tuple[str, str], ...]
    ko_say: tuple[str, ...]
    en_say: tuple[str, ...]
    ko_ask: tuple[str, ...] = field(default=())
    en_ask: tuple[str, ...] = field(default=())
    ko_more: tuple[str, ...] = field(default=())
    en_more: tuple[str, ...] = field(default=())
    ko_held: tuple[str, ...] = field(default=())
    en_held: tuple[str, ...] = field(default=())


_PARTICLE = re.compile(r"(.)\[([^/\]]+)/([^\]]+)\]")
# Final consonants of the digits and Latin letters as they are read aloud in Korean (일, 삼, 엠, 엘 ...).
_READ_WITH_FINAL = frozenset("013678LMNRlmnr")
_READ_WITH_RIEUL = frozenset("178LRlr")


def particles(text: str) -> str:
    """Resolve Korean particles such as ``[은/는]`` by the final consonant of the letter before them."""

    def resolve(match: re.Match[str]) -> str:
        last, with_final, without = match.group(1), match.group(2), match.group(3)
        code = ord(last) - 0xAC00
        if 0 <= code < 11172:
            final, rieul = code % 28 != 0, code % 28 == 8
        else:
            final, rieul = last in _READ_WITH_FINAL, last in _READ_WITH_RIEUL
        if with_final == "으로" and rieul:
            final = False
        return last + (with_final if final else without)

    return _PARTICLE.sub(resolve, text)


ASPECTS: dict[str, Aspect] = {
    a.key: a
    for a in (
        Aspect(
            "fee",
            tuple((f"{n},000원", f"{n},000 won") for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 15)),
            (
                "{t}[은/는] 수수료가 {v}입니다",
                "{t} 수수료는 {v}입니다",
                "{t} 한 건에 {v}[을/를] 받습니다",
            ),
            (
                "For {t}, the fee is {v}",
                "The fee for {t} is {v}",
                "We charge {v} for {t}",
            ),
            ko_ask=(
                "{t} 수수료가 얼마예요?",
                "{t} 수수료가 얼마인지 알려 주세요.",
                "{t}[을/를] 하려는데 수수료가 있나요?",
                "{t} 비용이 얼마나 드나요?",
            ),
            en_ask=(
                "How much is the fee for {t}?",
                "What does it cost? I am asking about {t}.",
                "Is there a fee for {t}?",
                "Could you tell me the charge for {t}?",
            ),
            ko_more=(
                "{t} 한 번 하면 돈이 얼마나 들어요?",
                "{t}에 드는 수수료를 알고 싶습니다.",
                "{t} 수수료 좀 확인 부탁드려요.",
                "{t} 얼마 내야 돼요?",
                "{t} 하면 수수료 얼마나 떼나요?",
            ),
            en_more=(
                "How much will you charge me for {t}?",
                "I'd like to know the price of {t}.",
                "What's the fee these days for {t}?",
                "Do I have to pay for {t}, and how much?",
            ),
            ko_held=("{t}[을/를] 하면 수수료로 얼마를 내야 하나요?", "혹시 {t} 수수료는 얼마로 되어 있을까요?"),
            en_held=("What would {t} cost me?", "Roughly what fee applies to {t}?"),
        ),
        Aspect(
            "counter",
            tuple((f"{n}번 창구", f"counter {n}") for n in range(1, 13)),
            (
                "{t}[은/는] {v}에서 도와드립니다",
                "{t} 담당은 {v}입니다",
                "{t} 때문에 오시면 {v}로 와 주십시오",
            ),
            (
                "For {t}, {v} will help you",
                "You can go to {v} for {t}",
                "Please take {t} to {v}",
            ),
            ko_ask=(
                "{t}[은/는] 몇 번 창구로 가면 되나요?",
                "{t}[을/를] 하려는데 어느 창구로 가야 해요?",
                "{t} 창구가 어디인지 알려 주세요.",
            ),
            en_ask=(
                "Which counter handles {t}?",
                "Which counter should I go to for {t}?",
                "Where in the branch do I go for {t}?",
            ),
            ko_more=(
                "지점에 왔는데 {t} 어느 창구예요?",
                "{t} 업무 보는 창구 번호가 궁금합니다.",
                "번호표 뽑기 전에 여쭤봐요. {t} 몇 번 창구죠?",
            ),
            en_more=(
                "I'm in the branch now. Which counter is it for {t}?",
                "What is the counter number for {t}?",
                "Before I take a ticket: which counter does {t}?",
            ),
            ko_held=("{t} 담당 창구는 몇 번인가요?", "방문하면 {t}[은/는] 어느 창구에서 해 주시나요?"),
            en_held=("Who at the counters can help me with {t}?", "For {t}, which counter do I want?"),
        ),
        Aspect(
            "desk",
            tuple((f"내선 {n}번", f"extension {n}") for n in (21, 24, 27, 32, 35, 38, 43, 46, 49, 52, 57, 64)),
            (
                "{t}[은/는] {v}으로 문의해 주십시오",
                "{t} 담당자는 {v}입니다",
                "{t} 상담은 {v}에서 받습니다",
            ),
            (
                "For {t}, please call {v}",
                "The number for {t} is {v}",
                "You can ask {v} about {t}",
            ),
            ko_ask=(
                "{t}[은/는] 어디로 전화해야 하나요?",
                "{t} 담당 부서 내선 번호가 어떻게 되나요?",
                "{t} 문의는 어느 번호로 하면 돼요?",
            ),
            en_ask=(
                "Which number do I call about {t}?",
                "What is the extension for {t}?",
                "Who do I phone about {t}?",
            ),
            ko_more=(
                "{t} 담당자와 통화하고 싶은데 내선이 몇 번이에요?",
                "{t} 전화 상담 번호 좀 알려 주세요.",
                "전화로 {t} 물어보려면 몇 번을 눌러요?",
            ),
            en_more=(
                "I want to talk to someone about {t}. What extension?",
                "Can you give me the direct line for {t}?",
                "I'd rather phone. Which extension is it for {t}?",
            ),
            ko_held=("{t} 건으로 통화하려면 내선 몇 번으로 걸어야 하죠?", "{t} 쪽 직통 내선을 알 수 있을까요?"),
            en_held=("Which extension should I dial for {t}?", "Is there a phone extension for {t}?"),
        ),
        Aspect(
            "form",
            tuple((f"서식 {n}호", f"form {n}") for n in (13, 14, 16, 17, 18, 19, 23, 26, 28, 29, 31, 34)),
            (
                "{t}[은/는] {v}를 작성해 주십시오",
                "{t}에는 {v}가 필요합니다",
                "{t} 신청서는 {v}입니다",
            ),
            (
                "For {t}, please fill in {v}",
                "You need {v} for {t}",
                "The paper for {t} is {v}",
            ),
            ko_ask=(
                "{t}[은/는] 어떤 서식을 써야 하나요?",
                "{t} 신청서가 몇 호 서식인가요?",
                "{t}[을/를] 하려면 무슨 서식이 필요해요?",
            ),
            en_ask=(
                "Which form do I need for {t}?",
                "What form should I fill in for {t}?",
                "What is the form number for {t}?",
            ),
            ko_more=(
                "{t} 서류 미리 써 가려고요. 서식 번호 좀요.",
                "{t} 때 쓰는 양식이 뭐예요?",
                "{t} 신청 서식 이름을 알고 싶습니다.",
            ),
            en_more=(
                "I want to prepare the paperwork for {t}. Which form?",
                "Which paper do I have to sign for {t}?",
                "Please tell me the form you use for {t}.",
            ),
            ko_held=("{t}에 필요한 서식 번호가 어떻게 되나요?", "{t}[을/를] 신청하려면 몇 호 서식을 써 가면 될까요?"),
            en_held=("For {t}, what form number should I look for?", "What form goes with {t}?"),
        ),
        Aspect(
            "days",
            tuple((f"{n}영업일", f"{n} business days") for n in range(2, 14)),
            (
                "{t}[은/는] {v}이 걸립니다",
                "{t} 처리 기간은 {v}입니다",
                "{t} 신청 후 {v} 안에 끝납니다",
            ),
            (
                "For {t}, it takes {v}",
                "We need {v} for {t}",
                "The time for {t} is {v}",
            ),
            ko_ask=(
                "{t}[은/는] 며칠이나 걸리나요?",
                "{t} 기간이 얼마나 걸려요?",
                "{t}[을/를] 하면 언제 처리되나요?",
            ),
            en_ask=(
                "How long does it take? It is about {t}.",
                "How many days does {t} take?",
                "When will you be done with {t}?",
            ),
            ko_more=(
                "{t} 오늘 하면 언제 끝나요?",
                "{t} 오래 걸리나요? 며칠 보면 돼요?",
                "{t} 처리 기간이 궁금합니다.",
            ),
            en_more=(
                "How soon can you finish {t}?",
                "How many days should I allow for {t}?",
                "I'm in a hurry. How long is the wait for {t}?",
            ),
            ko_held=("{t} 완료까지 영업일로 며칠 잡아야 하나요?", "{t} 신청하고 얼마나 기다려야 할까요?"),
            en_held=("What is the processing time of {t}?", "How long should I expect {t} to take?"),
        ),
        Aspect(
            "limit",
            tuple((f"{n},000만 원", f"{n}0 million won") for n in range(1, 10))
            + tuple((f"{n}억 원", f"{n}00 million won") for n in (1, 2, 3)),
            (
                "{t}[은/는] {v}까지 가능합니다",
                "{t} 한도는 {v}입니다",
                "{t} 최대 금액은 {v}으로 정해져 있습니다",
            ),
            (
                "For {t}, the limit is {v}",
                "The limit of {t} is {v}",
                "We allow up to {v} for {t}",
            ),
            ko_ask=(
                "{t} 한도가 얼마예요?",
                "{t}[은/는] 최대 얼마까지 되나요?",
                "{t} 한도를 알려 주세요.",
            ),
            en_ask=(
                "What is the limit for {t}?",
                "How much is the maximum for {t}?",
                "Is there a limit on {t}?",
            ),
            ko_more=(
                "{t} 얼마까지 할 수 있어요?",
                "{t} 최고 금액이 궁금합니다.",
                "{t} 한도 좀 확인해 주실래요?",
            ),
            en_more=(
                "Up to how much can I get with {t}?",
                "What's the most you allow for {t}?",
                "Please check the cap on {t}.",
            ),
            ko_held=("{t}[은/는] 금액 제한이 얼마로 되어 있나요?", "{t} 가능한 최대 금액이 얼마일까요?"),
            en_held=("What ceiling applies to {t}?", "How high does the limit go for {t}?"),
        ),
        Aspect(
            "menu",
            tuple(
                (f"앱 '{ko}' 메뉴", f"the '{en}' menu of the app")
                for ko, en in (
                    ("라운지", "Lounge"),
                    ("서랍", "Drawer"),
                    ("한눈에", "Glance"),
                    ("마이", "My"),
                    ("더하기", "Plus"),
                    ("모아", "Gather"),
                    ("지갑", "Wallet"),
                    ("바로", "Now"),
                    ("우리집", "Home"),
                    ("달력", "Calendar"),
                    ("나침반", "Compass"),
                    ("정원", "Garden"),
                )
            ),
            (
                "{t}[은/는] {v}에서 하실 수 있습니다",
                "{t} 신청은 {v}에 있습니다",
                "{t} 때는 {v}를 눌러 주십시오",
            ),
            (
                "For {t}, you can use {v}",
                "You will find {t} in {v}",
                "Please open {v} for {t}",
            ),
            ko_ask=(
                "{t}[은/는] 앱 어느 메뉴에서 하나요?",
                "앱에서 {t}[을/를] 하려면 어디로 들어가요?",
                "{t} 메뉴가 앱 어디에 있어요?",
            ),
            en_ask=(
                "Where in the app do I find {t}?",
                "Which menu of the app is for {t}?",
                "Can I use the app for {t}? Where is it?",
            ),
            ko_more=(
                "앱을 아무리 뒤져도 {t}[이/가] 안 보여요. 어느 메뉴죠?",
                "폰으로 {t} 하고 싶은데 뭘 눌러야 해요?",
                "{t} 앱 메뉴 이름이 궁금합니다.",
            ),
            en_more=(
                "I can't find {t} in the app. Which menu?",
                "What do I tap on my phone for {t}?",
                "Which app menu should I open for {t}?",
            ),
            ko_held=(
                "스마트폰 앱으로 {t} 하려면 어떤 메뉴를 열어야 하나요?",
                "{t}[은/는] 앱에서 어느 메뉴에 숨어 있나요?",
            ),
            en_held=("Under which app menu is {t}?", "On the phone app, where does {t} live?"),
        ),
        Aspect(
            "until",
            tuple(
                (f"{part} {h}시" + (" 30분" if half else ""), f"{h}{':30' if half else ''} {ap}")
                for part, ap, h, half in (
                    ("오전", "a.m.", 10, 0),
                    ("오전", "a.m.", 10, 1),
                    ("오전", "a.m.", 11, 0),
                    ("오전", "a.m.", 11, 1),
                    ("오후", "p.m.", 1, 0),
                    ("오후", "p.m.", 1, 1),
                    ("오후", "p.m.", 2, 0),
                    ("오후", "p.m.", 2, 1),
                    ("오후", "p.m.", 3, 0),
                    ("오후", "p.m.", 3, 1),
                    ("오후", "p.m.", 4, 0),
                    ("오후", "p.m.", 5, 0),
                )
            ),
            (
                "{t}[은/는] {v}까지 접수합니다",
                "{t} 마감 시간은 {v}입니다",
                "{t} 때문에 오시면 {v} 전에 와 주십시오",
            ),
            (
                "For {t}, we are open until {v}",
                "The last time for {t} is {v}",
                "Please come before {v} for {t}",
            ),
            ko_ask=(
                "{t}[은/는] 몇 시까지 되나요?",
                "{t} 마감 시간이 언제예요?",
                "{t}[을/를] 하려는데 몇 시까지 가야 해요?",
            ),
            en_ask=(
                "Until what time can I come for {t}?",
                "When do you close for {t}?",
                "What is the cut-off time for {t}?",
            ),
            ko_more=(
                "퇴근하고 가면 {t} 늦나요? 몇 시까지예요?",
                "{t} 접수 마감 좀 알려 주세요.",
                "오늘 {t} 되나요? 몇 시에 끝나요?",
            ),
            en_more=(
                "How late can I come in for {t}?",
                "I finish work late. What's the last time for {t}?",
                "By what time must I be there for {t}?",
            ),
            ko_held=("{t} 접수는 하루 중 언제까지 받으시나요?", "{t}[은/는] 늦어도 몇 시에는 도착해야 하나요?"),
            en_held=("What's the latest hour for {t}?", "At what time does {t} stop for the day?"),
        ),
    )
}


def split(names: str) -> tuple[str, ...]:
    """The names that ``/`` separates; word lists are written this way to stay readable."""
    return tuple(names.split("/"))


def _topics(*rows: tuple[str, str, str]) -> dict[str, Topic]:
    """Topics by key, from rows of (key, Korean names, English names)."""
    return {key: Topic(key, split(ko), split(en)) for key, ko, en in rows}


# The first two names of a topic are those that institutions use; the others are how customers put it.
BANK_TOPICS: dict[str, Topic] = _topics(
    (
        "remit",
        "해외송금/외화 송금/외국으로 돈 보내기/미국에 있는 아들에게 송금",
        "an overseas transfer/a transfer abroad/sending money home/wiring money to my family overseas",
    ),
    (
        "inward",
        "해외송금 수취/외화 입금/외국에서 온 돈 받기/해외에서 보낸 돈 찾기",
        "an incoming transfer/a payment from abroad/money sent to me from overseas/collecting a foreign payment",
    ),
    (
        "exchange",
        "환전/외화 환전/달러 바꾸기/엔화로 바꾸기",
        "a currency exchange/changing money/getting dollars/swapping won for yen",
    ),
    (
        "fxdeposit",
        "외화예금 가입/외화통장 개설/달러 통장 만들기/달러 예금",
        "a foreign currency deposit/a foreign currency account/a dollar account/saving in dollars",
    ),
    (
        "foreigner",
        "외국인 계좌 개설/외국인 통장 개설/외국인 친구 통장 만들기/여권으로 계좌 만들기",
        "opening a foreigner's account/a foreigner's account/a first account as an expat/an account with my passport",
    ),
    (
        "arc",
        "외국인등록증 정보 변경/체류기간 정보 갱신/새 외국인등록증 등록/비자 연장 정보 등록",
        "a residence card update/updating the residence card/registering my new ARC/my visa extension",
    ),
    (
        "refund",
        "부가세 환급/관광객 세금 환급/여행자 세금 돌려받기/택스 리펀드",
        "a tourist tax refund/a tax refund/getting back the tax on my shopping/the tax on my receipts",
    ),
    (
        "passbook",
        "통장 재발급/통장 재발행/잃어버린 통장 다시 만들기/통장 새로 만들기",
        "a passbook reissue/a new passbook/replacing my lost passbook/another copy of my bankbook",
    ),
    (
        "debit",
        "체크카드 재발급/체크카드 재발행/망가진 체크카드 교체/체크카드 새로 만들기",
        "a debit card reissue/a new debit card/replacing my broken debit card/another debit card",
    ),
    (
        "credit",
        "신용카드 한도 상향/신용카드 한도 증액/신용카드 한도 올리기/카드 한도 늘리기",
        "a credit limit increase/raising the credit limit/a higher limit on my credit card/more room on my credit card",
    ),
    (
        "lost",
        "카드 분실 신고/분실 카드 신고/잃어버린 카드 정지/카드 잃어버린 거 신고",
        "a lost card report/reporting a lost card/blocking my missing card/a card I left in a taxi",
    ),
    (
        "netbank",
        "인터넷뱅킹 가입/인터넷뱅킹 신청/인터넷뱅킹 시작하기/컴퓨터로 은행 업무 보기",
        "joining online banking/online banking/banking on my computer/setting up web banking",
    ),
    (
        "otp",
        "보안매체 재발급/보안카드 교체/오티피 새로 받기/오티피 기계 교체",
        "a security token reissue/a new security token/replacing my OTP device/an OTP that stopped working",
    ),
    (
        "translimit",
        "이체 한도 변경/이체 한도 상향/하루 이체 금액 늘리기/계좌이체 한도 풀기",
        "a transfer limit change/raising the transfer limit/sending more per day/unlocking bigger transfers",
    ),
    (
        "vault",
        "대여금고 이용/대여금고 신청/금고 빌리기/귀중품 보관",
        "a safe deposit box/renting a safe deposit box/keeping my valuables with you/a small vault for jewellery",
    ),
    (
        "wealth",
        "자산관리 상담/자산 상담 예약/재산 굴리기 상담/피비 상담",
        "a wealth consultation/a wealth management meeting/advice on my savings/a talk with a private banker",
    ),
    (
        "fund",
        "펀드 가입/펀드 신규 가입/펀드 하나 들기/적립식 펀드 시작",
        "buying a fund/a new fund/putting money in a fund/a monthly fund plan",
    ),
    (
        "pension",
        "퇴직연금 이전/연금 계좌 이전/다른 회사 연금 옮기기/퇴직금 계좌 옮기기",
        "a pension transfer/moving a pension/bringing my pension to you/rolling over my retirement money",
    ),
    (
        "mortgage",
        "주택담보대출 신청/주택담보대출/집 사려고 받는 대출/아파트 담보로 대출",
        "a mortgage/a mortgage application/a loan to buy my flat/borrowing against my apartment",
    ),
    (
        "research",
        "연구원 신용대출/연구원 대출 신청/연구소 직원 대출/박사급 신용대출",
        "a researcher loan/a loan for researchers/a credit loan as a scientist/a loan for lab staff",
    ),
    (
        "jeonse",
        "전세자금대출 신청/전세자금대출/전셋집 대출/전세 보증금 대출",
        "a rent deposit loan/a jeonse loan/a loan for my key money/borrowing the deposit for my rental",
    ),
    (
        "prepay",
        "대출 중도상환/대출 조기 상환/대출금 미리 갚기/남은 대출 한꺼번에 갚기",
        "an early loan repayment/repaying a loan early/paying off my loan ahead of time/clearing my debt early",
    ),
    (
        "letter",
        "수입신용장 개설/신용장 개설/수입 엘씨 열기/수입 대금 신용장",
        "opening a letter of credit/an import letter of credit/an L/C for our imports/an L/C for our supplier",
    ),
    (
        "export",
        "수출환어음 매입/수출 어음 매입/수출 서류 네고/수출 대금 미리 받기",
        "an export bill purchase/selling an export bill/negotiating our export documents/early cash on our exports",
    ),
    (
        "forward",
        "선물환 계약/선물환 거래/환율 미리 고정하기/환헤지 계약",
        "a forward contract/a currency forward/fixing our exchange rate/hedging our dollars",
    ),
    (
        "terminal",
        "가맹점 단말기 신청/카드 단말기 신청/가게 카드기 설치/식당 카드 단말기",
        "a card terminal/a merchant terminal/a card reader for my shop/taking cards at my cafe",
    ),
    (
        "balance",
        "잔액증명서 발급/예금잔액증명서 발급/비자용 잔액증명/통장 잔고 증명",
        "a balance certificate/a certificate of balance/proof of funds for a visa/a paper that shows my balance",
    ),
    (
        "history",
        "거래내역서 발급/거래내역 증명 발급/입출금 내역 뽑기/작년 거래내역 출력",
        "a transaction statement/an account statement/a printout of my transactions/last year's statement",
    ),
    (
        "coin",
        "동전 교환/동전 입금/저금통 동전 바꾸기/동전 지폐로 바꾸기",
        "a coin exchange/a coin deposit/changing a jar of coins/turning coins into notes",
    ),
    (
        "tuition",
        "등록금 납부/대학 등록금 납부/학교 등록금 내기/기숙사비와 등록금 내기",
        "a tuition payment/paying tuition/my university bill/my son's college fee",
    ),
    (
        "inherit",
        "상속예금 지급/상속예금 청구/돌아가신 아버지 예금 찾기/부모님 예금 상속",
        "an inherited deposit/a claim for an inherited deposit/my late father's account/money my mother left me",
    ),
    (
        "localtax",
        "지방세 납부/공과금 납부/재산세 내기/자동차세 내기",
        "a local tax payment/a utility bill payment/my property tax/my car tax",
    ),
)

# Other institutions' topics, for pretraining only.
OTHER_TOPICS: dict[str, Topic] = _topics(
    ("library", "도서 대출증 발급/회원증 발급", "a library card/a reader's card"),
    ("parking", "주차권 신청/정기 주차 신청", "a parking permit/a monthly parking pass"),
    ("gym", "체육관 등록/헬스장 이용", "a gym membership/the gym"),
    ("pool", "수영장 이용/수영 강습 신청", "the swimming pool/a swimming class"),
    ("fibre", "인터넷 설치/인터넷 이전 설치", "an internet installation/a fibre connection"),
    ("phone", "번호 이동/휴대폰 명의 변경", "a number transfer/a new phone plan"),
    ("hall", "회의실 예약/강당 대관", "a meeting room/renting the hall"),
    ("waste", "대형 폐기물 배출/폐가전 수거", "a bulky waste pickup/collecting old furniture"),
    ("idcard", "주민등록증 재발급/신분증 재발급", "a new identity card/an identity card reissue"),
    ("passport", "여권 발급/여권 갱신", "a passport/a passport renewal"),
    ("vaccine", "예방접종 예약/독감 접종", "a vaccination/a flu shot"),
    ("checkup", "건강검진 예약/종합검진 신청", "a health check/a full check-up"),
    ("claim", "보험금 청구/실손보험 청구", "an insurance claim/a medical claim"),
    ("repair", "노트북 수리/화면 교체", "a laptop repair/a screen replacement"),
    ("course", "강좌 수강 신청/외국어 강좌 등록", "a language course/enrolling in a course"),
    ("transcript", "성적증명서 발급/졸업증명서 발급", "a transcript/a graduation certificate"),
    ("parcel", "국제 소포 발송/등기 우편 발송", "an overseas parcel/a registered letter"),
    ("luggage", "수하물 보관/짐 보관", "a luggage locker/storing luggage"),
    ("rental", "자동차 대여/자전거 대여", "a car rental/a bicycle rental"),
    ("visa", "비자 연장/체류 자격 변경", "a visa extension/a change of visa status"),
)


def answer(aspect: Aspect, lang: str, name: str, value: int, wording: int) -> str:
    """State one thing, without the closing mark.

    Args:
        aspect: what is stated.
        lang: the language.
        name: the topic's name in that language.
        value: index of the value in ``aspect.values``.
        wording: index of the sentence in ``aspect.ko_say`` or ``aspect.en_say``.
    """
    if lang == "ko":
        return particles(aspect.ko_say[wording].format(t=name, v=aspect.values[value][0]))
    text = aspect.en_say[wording].format(t=name, v=aspect.values[value][1])
    return text[0].upper() + text[1:]


def misspell(text: str, lang: str, rng: random.Random) -> str:
    """Make a question look typed in a hurry: one or two slips of the kind that people make."""
    slips: tuple[Callable[[str], str], ...] = (
        (
            lambda s: s.replace("요?", "여?").replace("요.", "여."),
            lambda s: s.replace(" ", "", 1),
            lambda s: s.rstrip("?.") + "..",
            lambda s: s.rstrip("?.") + "ㅠㅠ",
            lambda s: s.rstrip("?.") + "??",
            lambda s: s.replace("돼요", "되요").replace("되나요", "돼나요"),
            lambda s: s.replace("안녕하세요", "안녕하세여").replace("입니다", "임다", 1),
        )
        if lang == "ko"
        else (
            lambda s: s.lower(),
            lambda s: s.replace("'", ""),
            lambda s: s.rstrip("?.") + "??",
            lambda s: s.rstrip("?."),
            lambda s: s.replace("Which", "Wich").replace("which", "wich"),
            lambda s: s.replace("please", "pls").replace("Please", "Pls").replace(" you ", " u "),
            lambda s: s.replace("the ", "teh ", 1),
        )
    )
    for slip in rng.sample(slips, rng.choice((1, 1, 2))):
        text = slip(text)
    return text
