"""Draw the journey of one update, in two languages, light and dark: `python docs/pictures/draw_journey.py`.

The SVG files beside this script are its output, byte for byte; tests/test_pictures.py compares them.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 880, 560
FONT = "system-ui, -apple-system, 'Segoe UI', 'Apple SD Gothic Neo', 'Noto Sans KR', NanumGothic, sans-serif"


@dataclass(frozen=True)
class Palette:
    """The colours of one drawing, as CSS."""

    page: str
    text: str
    quiet: str
    card: str
    site: str
    server: str
    officer: str


PALETTES = {
    "light": Palette("#ffffff", "#1f2328", "#59636e", "#ffffff", "#0a7f5a", "#0b5cad", "#9a5b00"),
    "dark": Palette("#0d1117", "#f0f6fc", "#9198a1", "#161b22", "#3fb98a", "#58a6ff", "#e3a84a"),
}


@dataclass(frozen=True)
class Words:
    """What one drawing says; a box is its title and its lines."""

    title: str
    site: tuple[str, str]
    steps: Sequence[Sequence[str]]
    upload: Sequence[str]
    adapter: Sequence[str]
    server: tuple[str, str]
    total: Sequence[str]
    update: Sequence[str]
    evidence: str
    officer: Sequence[str]


WORDS = {
    "en": Words(
        title="The journey of one update, from the records of a site to the audit report",
        site=("Every site", "records and keys stay here"),
        steps=(
            ("1  Charge", "The ledger writes the", "cost to disk before a", "record is used."),
            ("2  Sample and clip", "Records are drawn at", "random. Each gradient", "is clipped to a norm."),
            ("3  Add noise", "Each site adds a part.", "The parts add up to", "the planned noise."),
            ("4  Mask", "Secure aggregation", "hides each update", "from the server."),
        ),
        upload=("masked update and", "signed statement"),
        adapter=("next round:", "the new adapter"),
        server=("Server", "sees no record and no single update"),
        total=("5  Sum", "The masks cancel in the sum of all sites.", "Only this noisy sum can be read."),
        update=("6  Step", "The noisy sum moves the shared adapter.", "All sites get the new adapter."),
        evidence="signed run log and ledger exports",
        officer=("7  Verify", "A privacy officer checks the audit report offline: every epsilon is computed again."),
    ),
    "ko": Words(
        title="업데이트 하나가 사이트의 기록에서 감사 보고서에 이르기까지",
        site=("각 사이트", "기록과 키는 이곳을 떠나지 않습니다"),
        steps=(
            ("1  차감", "기록을 사용하기 전에", "프라이버시 비용을 먼저", "원장에 적습니다."),
            ("2  표본추출과 클리핑", "기록을 무작위로 뽑고", "기울기의 크기를", "일정하게 제한합니다."),
            ("3  잡음 추가", "사이트마다 잡음을 나누어", "더하면, 합쳐서 계획한", "만큼의 잡음이 됩니다."),
            ("4  마스킹", "보안 집계로", "개별 업데이트를", "서버에 숨깁니다."),
        ),
        upload=("마스킹된 업데이트와", "서명한 확인서"),
        adapter=("다음 라운드:", "새 어댑터"),
        server=("서버", "기록도 개별 업데이트도 볼 수 없습니다"),
        total=("5  합산", "모두 더하면 마스크가 상쇄됩니다.", "잡음이 섞인 합계만 읽을 수 있습니다."),
        update=("6  갱신", "잡음이 섞인 합계로 공동 어댑터를 갱신합니다.", "새 어댑터를 모든 사이트에 보냅니다."),
        evidence="서명된 실행 로그와 원장 사본",
        officer=("7  검증", "개인정보 보호 담당자가 오프라인에서 감사 보고서의 모든 엡실론을 다시 계산합니다."),
    ),
}


def _text(x: float, y: float, words: str, color: str, *, size: int = 15, bold: bool = False, end: str = "start") -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{end}"{weight}>{escape(words)}</text>'


def _rect(x: float, y: float, width: float, height: float, fill: str, line: str, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="{fill}" stroke="{line}" '
        f'stroke-width="1.5"{dashes}/>'
    )


def _arrow(x: float, y: float, to_x: float, to_y: float, color: str) -> str:
    """Return a straight arrow, along one axis."""
    right, down = (to_x > x) - (to_x < x), (to_y > y) - (to_y < y)
    head = " ".join(f"{to_x - 10 * right + 6 * down * side},{to_y - 10 * down + 6 * right * side}" for side in (1, -1))
    return (
        f'<path d="M{x},{y} L{to_x - 9 * right},{to_y - 9 * down}" stroke="{color}" stroke-width="2.5" fill="none"/>'
        f'<polygon points="{to_x},{to_y} {head}" fill="{color}"/>'
    )


def _box(x: float, y: float, width: float, height: float, words: Sequence[str], colors: tuple[str, Palette]) -> str:
    color, palette = colors
    lines = [_text(x + 14, y + 50 + 20 * number, line, palette.text) for number, line in enumerate(words[1:])]
    title = _text(x + 14, y + 27, words[0], color, size=16, bold=True)
    return "".join((_rect(x, y, width, height, palette.card, color), title, *lines))


def _frame(y: float, height: float, words: tuple[str, str], color: str, palette: Palette) -> Iterable[str]:
    yield _rect(20, y, 840, height, palette.page, color, "6 5")
    yield _text(36, y + 26, words[0], color, size=17, bold=True)
    yield _text(150, y + 26, words[1], palette.quiet)


def draw(words: Words, palette: Palette) -> str:
    """Return the drawing as the text of an SVG file."""
    parts = [_rect(0, 0, WIDTH, HEIGHT, palette.page, palette.page)]
    for offset in (12, 6):  # there are many sites
        parts.append(_rect(20 + offset, 28 - offset, 840, 172, palette.page, palette.site))
    parts += _frame(28, 172, words.site, palette.site, palette)
    parts += _frame(274, 144, words.server, palette.server, palette)
    for number, step in enumerate(words.steps):
        x = 32 + 207 * number
        parts.append(_box(x, 72, 195, 114, step, (palette.site, palette)))
        if number:
            parts.append(_arrow(x - 12, 129, x, 129, palette.site))
    parts.append(_arrow(750, 186, 750, 317, palette.site))
    parts += [_text(736, 232 + 20 * number, line, palette.text, end="end") for number, line in enumerate(words.upload)]
    parts.append(_box(458, 318, 390, 86, words.total, (palette.server, palette)))
    parts.append(_arrow(458, 361, 423, 361, palette.server))
    parts.append(_box(32, 318, 390, 86, words.update, (palette.server, palette)))
    parts.append(_arrow(130, 318, 130, 187, palette.server))
    parts += [_text(144, 232 + 20 * number, line, palette.text) for number, line in enumerate(words.adapter)]
    parts.append(_arrow(440, 418, 440, 475, palette.officer))
    parts.append(_text(456, 450, words.evidence, palette.text))
    parts.append(_box(20, 476, 840, 68, words.officer, (palette.officer, palette)))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="{FONT}" role="img" aria-label="{escape(words.title)}">\n<title>{escape(words.title)}</title>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def pictures() -> dict[str, str]:
    """Return every file's name and text."""
    return {
        f"journey.{language}.{mode}.svg": draw(words, palette)
        for language, words in WORDS.items()
        for mode, palette in PALETTES.items()
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, text in pictures().items():
        (folder / name).write_text(text, "utf-8")
