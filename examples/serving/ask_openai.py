"""Ask one question of a served model with the openai client: pip install openai

FEDLLM_URL=https://127.0.0.1:8443/v1 FEDLLM_CA=ca.pem FEDLLM_TOKEN=... python examples/serving/ask_openai.py
"""

import os
import ssl
import sys

from openai import DefaultHttpxClient, OpenAI

QUESTION = "통장 재발급 수수료가 얼마예요?"


def main() -> None:
    """Print the answer while it is being made."""
    trusted = ssl.create_default_context(cafile=os.environ["FEDLLM_CA"])
    with DefaultHttpxClient(verify=trusted) as line:
        client = OpenAI(base_url=os.environ["FEDLLM_URL"], api_key=os.environ["FEDLLM_TOKEN"], http_client=line)
        question = " ".join(sys.argv[1:]) or QUESTION
        for chunk in client.chat.completions.create(
            model=client.models.list().data[0].id,  # a server has one
            messages=[{"role": "user", "content": question}],
            max_tokens=40,
            temperature=0,
            stream=True,
        ):
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
