"""A stock Flower app with Opacus, as its users write one: the work of `peers.py`, which runs this as a process.

Every message loads the base model, the adapter and the site's records, and makes one round's DP-SGD steps with Opacus'
hooks. Nothing is shared between messages: Flower gives a message to whichever Ray actor is free.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from opacus import PrivacyEngine
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

_IGNORE = -100

client_app = ClientApp()


def settings(folder: Path) -> dict[str, Any]:
    """Return what `peers.py` wrote for its peers: the model, and the training of the plan."""
    return cast(dict[str, Any], json.loads((folder / "peer.json").read_text("utf-8")))


def lora_model(told: dict[str, Any]) -> Any:
    """Return the base with a LoRA adapter on all its linear layers, B alone trained as in fedllm's demo."""
    base = AutoModelForCausalLM.from_pretrained(
        told["model"], trust_remote_code=False, use_safetensors=True, dtype=torch.float32
    )
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=told["rank"], lora_alpha=told["alpha"], target_modules="all-linear"))
    for name, value in model.named_parameters():
        if "lora_A" in name:
            value.requires_grad = False
    return model.train()


def encoded(told: dict[str, Any], site: int, folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return ids and labels of each of the site's records, int64[max_length]; the answer alone carries loss."""
    tokenizer = AutoTokenizer.from_pretrained(told["model"], trust_remote_code=False)
    lines = (folder / f"site-{site}.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    answers = tokenizer([row["answer"] for row in rows], add_special_tokens=False)["input_ids"]
    length = told["max_length"]
    made = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [*prompt, *answer, tokenizer.eos_token_id][:length]
        labels = [*(len(prompt) * [_IGNORE]), *answer, tokenizer.eos_token_id][:length]
        empty = length - len(ids)
        made.append((torch.tensor(ids + empty * [tokenizer.pad_token_id]), torch.tensor(labels + empty * [_IGNORE])))
    return made


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean over the records of each one's mean loss a token."""
    wanted = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), wanted, reduction="none", ignore_index=_IGNORE)
    return (losses.sum(1) / (wanted != _IGNORE).sum(1).clamp(min=1)).mean()


def without_padding(batch: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch's ids and labels, cut to its longest record."""
    ids, labels = (torch.stack(each) for each in zip(*batch, strict=True))
    longest = int((labels != _IGNORE).nonzero()[:, 1].max()) + 1
    return ids[:, :longest], labels[:, :longest]


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Answer with the adapter after the round's steps, and the epsilon that Opacus states for them."""
    folder = Path(str(message.content["config"]["folder"]))
    told = settings(folder)
    torch.set_num_threads(1)
    model = lora_model(told)
    set_peft_model_state_dict(model, cast(ArrayRecord, message.content["arrays"]).to_torch_state_dict())
    records = encoded(told, int(context.node_config["partition-id"]), folder)
    size = round(told["sampling_rate"] * len(records))
    loader: Any = DataLoader(cast(Any, records), batch_size=size, collate_fn=without_padding)
    engine = PrivacyEngine(accountant="prv")
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=told["learning_rate"]),
        data_loader=loader,
        noise_multiplier=told["noise_multiplier"],
        max_grad_norm=told["clip_norm"],
    )
    batches = iter(loader)
    used = 0
    for _ in range(told["local_steps"]):
        ids, labels = next(batches)
        optimizer.zero_grad()
        loss_of(private(input_ids=ids).logits, labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        used += len(ids)
    state = {name: value.detach() for name, value in get_peft_model_state_dict(private._module).items()}
    metrics = MetricRecord({"num-examples": used, "epsilon": engine.get_epsilon(told["delta"])})
    return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)


def main(folder: Path) -> None:
    """Run the federation on Flower's simulation engine, two Ray actors, and print a JSON line a round."""
    told = settings(folder)
    os.environ.update({"RAY_worker_niceness": "0"})  # Ray's own default lets its processes wait for all others
    server_app = ServerApp()

    class Told(FedAvg):
        """FedAvg that prints how long each round took."""

        def configure_train(self, *args: Any) -> Any:
            self.began = time.monotonic()
            return super().configure_train(*args)

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            replies = list(replies)
            metrics = [reply.content["metrics"] for reply in replies if reply.has_content()]
            done = super().aggregate_train(server_round, replies)
            print(json.dumps({
                "seconds": time.monotonic() - self.began, "sites": len(metrics),
                "records": sum(each["num-examples"] for each in metrics),
                "epsilon": max(each["epsilon"] for each in metrics),
            }), flush=True)  # fmt: skip
            return done

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        del context
        start = ArrayRecord(get_peft_model_state_dict(lora_model(told)))
        strategy = Told(fraction_evaluate=0.0, min_train_nodes=told["sites"], min_available_nodes=told["sites"])
        strategy.start(
            grid=grid, initial_arrays=start, num_rounds=told["rounds"],
            train_config=ConfigRecord({"folder": str(folder)}),
        )  # fmt: skip

    run_simulation(
        server_app=server_app, client_app=client_app, num_supernodes=told["sites"],
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0}},
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
