"""Load the adapter of a finished run with PEFT, and let the model answer without it and with it.

python examples/answer.py runs/first "Which desk handles card loss?"
"""

import sys
from importlib.resources import files

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedllm


def main() -> None:
    """Answer one question twice."""
    folder, question = sys.argv[1:]
    run = fedllm.load_run(folder)
    source = run.config["model"]["source"]
    if source.startswith("pkg://"):  # the embedded model lies in a package
        package, _, place = source.removeprefix("pkg://").partition("/")
        source = str(files(package) / place)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), str(run.adapter)).eval()
    inputs = tokenizer(run.config["data"]["prompt"].format(question=question), return_tensors="pt")
    inputs.pop("token_type_ids", None)

    def answer() -> str:
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    with model.disable_adapter():
        print("before:", answer())
    print("after: ", answer())


if __name__ == "__main__":
    main()
