"""Ask one question of a served model with Semantic Kernel: pip install semantic-kernel

FEDLLM_URL=https://127.0.0.1:8443/v1 FEDLLM_CA=ca.pem FEDLLM_TOKEN=... python examples/serving/ask_semantic_kernel.py
"""

import asyncio
import os
import ssl
import sys

from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from semantic_kernel import Kernel
from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion, OpenAIChatPromptExecutionSettings
from semantic_kernel.functions import KernelArguments

QUESTION = "통장 재발급 수수료가 얼마예요?"


async def main() -> None:
    """Print the answer to a prompt function while it is being made."""
    trusted = ssl.create_default_context(cafile=os.environ["FEDLLM_CA"])
    async with DefaultAsyncHttpxClient(verify=trusted) as line:
        client = AsyncOpenAI(base_url=os.environ["FEDLLM_URL"], api_key=os.environ["FEDLLM_TOKEN"], http_client=line)
        name = (await client.models.list()).data[0].id  # a server has one
        kernel = Kernel()
        kernel.add_service(OpenAIChatCompletion(ai_model_id=name, async_client=client))
        settings = OpenAIChatPromptExecutionSettings(max_completion_tokens=40, temperature=0)
        arguments = KernelArguments(settings, question=" ".join(sys.argv[1:]) or QUESTION)
        async for pieces in kernel.invoke_prompt_stream("{{$question}}", arguments=arguments):
            print("".join(map(str, pieces)), end="", flush=True)
        print()


if __name__ == "__main__":
    asyncio.run(main())
