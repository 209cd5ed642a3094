"""Ask one question of a served model with LangChain: pip install langchain-openai

FEDLLM_URL=https://127.0.0.1:8443/v1 FEDLLM_CA=ca.pem FEDLLM_TOKEN=... python examples/serving/ask_langchain.py

LangChain sends traces to LangSmith, in the cloud, if LANGSMITH_TRACING says so: questions and answers stay at the
office only without it.
"""

import os
import ssl
import sys

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from openai import DefaultHttpxClient, OpenAI

QUESTION = "통장 재발급 수수료가 얼마예요?"


def main() -> None:
    """Print the answer of a chain while it is being made."""
    os.environ["LANGSMITH_TRACING"] = "false"
    url, token = os.environ["FEDLLM_URL"], os.environ["FEDLLM_TOKEN"]
    trusted = ssl.create_default_context(cafile=os.environ["FEDLLM_CA"])
    with DefaultHttpxClient(verify=trusted) as line:
        name = OpenAI(base_url=url, api_key=token, http_client=line).models.list().data[0].id  # a server has one
        model = ChatOpenAI(
            model=name, base_url=url, api_key=token, http_client=line, max_completion_tokens=40, temperature=0
        )
        chain = ChatPromptTemplate.from_messages([("user", "{question}")]) | model | StrOutputParser()
        for text in chain.stream({"question": " ".join(sys.argv[1:]) or QUESTION}):
            print(text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
