"""What a user configures: one frozen class for each group of settings.

A value that is unknown, ill-typed or impossible raises ConfigError before anything loads.
"""

import codecs
import math
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from fedllm.adapter_vector import WireDtype
from fedllm.privacy.mechanism import Clipping
from fedllm.privacy.split import SHARE
from fedllm.values import (
    MAX_HOLDERS,
    MAX_ROUNDS,
    MAX_STEPS,
    MOST_CANARIES,
    Beta,
    BySite,
    Column,
    Frozen,
    Label,
    Layer,
    Printable,
    Rate,
    Seed,
)


class ModelConfig(Frozen):
    """The public base model."""

    source: Printable = Field(min_length=1, max_length=4096)
    """Name on the Hugging Face hub, local folder, or `pkg://package/folder`."""
    revision: Printable | None = Field(None, max_length=200)
    """Revision on the hub. Give a commit for runs that must repeat."""
    task: Literal["causal-lm", "classification"] = "causal-lm"
    """What the model learns: to continue a text, or to choose one of `labels`."""
    labels: tuple[Label, ...] = Field((), max_length=10_000)
    """Classification: every label, in the order of the classes. They are declared and public, never read from records.
    """
    pooling: Literal["native", "mean"] = "native"
    """Classification: `native` uses the model's own head, `mean` averages the token states."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the frozen weights. `auto` takes what is faster here; the adapter is always float32."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Keep the frozen weights of the transformer's linear layers in 8 bits (`int8`) or 4 (`nf4`, which needs
    `pip install 'fedllm[quantize]'`).
    """
    compile: Literal["auto", "on", "off"] = "auto"
    """Run the transformer blocks under torch.compile in training. `auto`: if that is possible and saves time."""
    max_length: int = Field(256, ge=8, le=1_000_000)
    """Tokens. A longer record loses the beginning of its prompt, then the end of its text."""

    @model_validator(mode="after")
    def _validate(self) -> "ModelConfig":
        if self.task == "classification" and len(self.labels) < 2:
            raise ValueError(
                "task=classification needs model.labels: at least two, declared and not read from the data"
            )
        if self.task == "causal-lm" and (self.labels or self.pooling != "native"):
            raise ValueError("labels and pooling belong to task=classification")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("model.labels holds a label twice")
        return self


class AdapterConfig(Frozen):
    """What is trained: LoRA (Hu et al. 2021), or another method of PEFT."""

    method: Literal["lora", "rslora", "dora", "ia3", "prompt", "prefix", "ptuning"] = "lora"
    """`lora`; `rslora`: LoRA times alpha / sqrt(rank); `dora`: LoRA, and the length of every row of the weights;
    `ia3`: a factor for every output of `targets`; `prompt`: virtual tokens before every text; `ptuning`: the same,
    computed by a small network; `prefix`: keys and values before every text, in every block.
    """
    rank: int = Field(8, ge=1, le=4096)
    """Rank of the two LoRA matrices (lora, rslora, dora)."""
    alpha: float = Field(16.0, ge=1e-4, le=1e5)
    """The LoRA matrices' output is multiplied by alpha / rank (lora, dora), or alpha / sqrt(rank) (rslora)."""
    targets: Annotated[tuple[Layer, ...], Field(max_length=1000)] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter, or `all-linear` (lora, rslora, dora, ia3)."""
    layers: Annotated[tuple[Annotated[int, Field(ge=0, lt=10_000)], ...], Field(max_length=10_000)] | None = None
    """Numbers of the transformer blocks that get an adapter, from 0. Null: all (lora, rslora, dora, ia3)."""
    train: Literal["AB", "B"] = "B"
    """`B` trains B alone and keeps A at its seeded, shared initial value (FFA-LoRA, Sun et al. 2024); `AB` trains both
    (lora, rslora, dora). The other methods train all that they have.
    """
    tokens: int = Field(20, ge=1, le=10_000)
    """Virtual tokens (prompt, prefix, ptuning). Together with `model.max_length` they fit the model's positions."""

    @model_validator(mode="after")
    def _validate(self) -> "AdapterConfig":
        if not self.targets or self.layers == ():
            raise ValueError(
                "targets and layers: name at least one, or all-linear for all targets and null for all layers"
            )
        used = {"method"} | ({"tokens"} if self.virtual_tokens else {"targets", "layers"})
        used |= {"rank", "alpha", "train"} if self.has_matrices else set()
        fields = type(self).model_fields
        idle = [name for name in fields if name not in used and getattr(self, name) != fields[name].default]
        if idle:
            remedy = " ".join(f"adapter.{name}={_written(fields[name].default)}" for name in idle)
            raise ValueError(f"method={self.method} has no {', '.join(idle)}. Set {remedy}")
        return self

    @property
    def has_matrices(self) -> bool:
        """Whether the method has LoRA's two matrices."""
        return self.method in ("lora", "rslora", "dora")

    @property
    def virtual_tokens(self) -> int:
        """Virtual tokens before every text; 0 if the method has none."""
        return self.tokens if self.method in ("prompt", "prefix", "ptuning") else 0

    @property
    def scaling(self) -> float:
        """The factor of the LoRA matrices' output (rslora: Kalajdzievski 2023); 1 if the method has none."""
        if not self.has_matrices:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.method == "rslora" else self.rank)

    @property
    def title(self) -> str:
        """What people call the method."""
        return {
            "lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA", "ia3": "IA3", "prompt": "prompt tuning",
            "prefix": "prefix tuning", "ptuning": "P-tuning",
        }[self.method]  # fmt: skip

    @property
    def summary(self) -> str:
        """The method and its size, in a few words."""
        if self.virtual_tokens:
            return f"{self.title}, {self.tokens} virtual tokens"
        return f"{self.title} rank {self.rank}, trains {self.train}" if self.has_matrices else self.title


def _written(value: object) -> str:
    """Return a default as it is written on a command line."""
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


class PrivacyConfig(Frozen):
    """What is protected, how well, and the mechanism that does it."""

    mode: Literal["local", "distributed", "off"] = "local"
    """`distributed`: the sites add shares of one noise and mask their sums. `local`: every site adds noise enough for
    itself. `off`: no noise, NOT PRIVATE.
    """
    colluding_sites: int = Field(1, ge=0, le=MAX_HOLDERS)
    """Mode distributed: as many sites of a quorum may tell the server their noise, and the guarantee still holds."""
    unit: Literal["record", "person"] = "record"
    """What is protected: one record more or less, or one person with all of their records."""
    records_per_person: int = Field(8, ge=1, le=1_000_000)
    """Unit person: the most records of one person that are used. The cap is enforced when records are loaded."""
    epsilon: float = Field(8.0, ge=1e-6, le=1e9)
    """Target for the whole run, at every site. The noise is calibrated to meet it."""
    # the PLD is cut off at tails of 1e-15, which must not count
    delta: float = Field(1e-5, ge=1e-12, lt=1)
    """Delta of the guarantee (epsilon, delta), for the whole run. It must be below 1 / `units_per_site`."""
    clipping: Clipping = "flat"
    """`flat` clips the gradient of each unit at `clip_norm`; `automatic` brings each to almost `clip_norm` (AUTO-S,
    arXiv 2206.07136).
    """
    clip_norm: float = Field(1.0, ge=1e-6, le=1e6)
    """L2 norm at which the gradient of one unit is clipped."""
    # draws have 53 bits: the true rate is within 1e-9 of it
    sampling_rate: float = Field(0.05, ge=1e-6, le=1)
    """Probability with which a unit enters one step (Poisson sampling)."""
    units_per_site: int | None = Field(None, ge=1, le=1_000_000_000)
    """PUBLIC nominal number of units of a site. Sampling rate times this divides every noisy sum. Null, in a simulation
    only: the mean of the sites to one digit.
    """
    noise_multiplier: float | None = Field(None, ge=0.01, le=1e6)
    """Standard deviation of the noise divided by the clip norm. Null: calibrated, so that the whole run meets
    `epsilon`.
    """
    insecure_seed: Seed | None = None
    """Seeds sampling and noise, so that a run repeats. For experiments only: NOT PRIVATE."""
    self_check: bool = True
    """Every site checks its engine on made-up text before any record is used. A deployed site does so whatever the plan
    says.
    """

    @model_validator(mode="after")
    def _validate(self) -> "PrivacyConfig":
        if self.mode != "off" and self.units_per_site is not None and self.delta * self.units_per_site >= 1:
            raise ValueError(
                f"delta={self.delta:g} is no protection among {self.units_per_site} units: it must be below "
                f"1/units = {1 / self.units_per_site:.2g}"
            )
        return self

    @property
    def protects(self) -> bool:
        """Whether the run may be called private: noise is added, and nobody can predict it."""
        return self.mode != "off" and self.insecure_seed is None


class ServerOptimizerConfig(Frozen):
    """How the server applies the averaged update; sgd with learning_rate=1 and no momentum is FedAvg."""

    name: Literal["sgd", "adam"] = "sgd"
    """How the server applies the averaged update. `sgd` with learning rate 1 and no momentum is FedAvg."""
    learning_rate: Rate = 1.0
    """Learning rate of the server."""
    final_rate: float = Field(1.0, ge=1e-6, le=1)
    """Where the cosine schedule of the learning rate ends, as a fraction of its start. 1: constant."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Momentum of sgd."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Decay rates of adam's two means."""
    eps: float = Field(1e-3, ge=1e-12, le=1e6)
    """Added to adam's denominator. It keeps coordinates without signal small (Reddi et al. 2021, tau)."""
    noise_corrected: bool = False
    """Adam: subtract the known variance of the noise from its mean of squares (DP-AdamBC)."""

    @model_validator(mode="after")
    def _validate(self) -> "ServerOptimizerConfig":
        if self.noise_corrected and self.name != "adam":
            raise ValueError(f"noise_corrected=true is a correction of adam, found name={self.name}")
        return self


class TrainingConfig(Frozen):
    """Rounds, local steps and optimisers."""

    rounds: int = Field(10, ge=1, le=MAX_ROUNDS)
    """Rounds of the run. Rounds times local steps is at most 1,000,000."""
    local_steps: int = Field(1, ge=1, le=MAX_STEPS)
    """Steps that a site takes in one round. Mode distributed takes 1."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimiser at the site, new in every round."""
    learning_rate: Rate = 0.1
    """Learning rate at the site."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Momentum at the site, with sgd."""
    server: ServerOptimizerConfig = ServerOptimizerConfig()
    """The optimiser of the server."""
    wire: WireDtype = "float16"
    """Precision of the updates that sites send."""
    keep: Literal["last", "best"] = "last"
    """The adapter that a run ends with: the last, or the one with the best score at the sites (`evaluation.every`)."""

    @model_validator(mode="after")
    def _validate(self) -> "TrainingConfig":
        if self.rounds * self.local_steps > MAX_STEPS:
            raise ValueError(
                f"rounds={self.rounds} of local_steps={self.local_steps} are {self.rounds * self.local_steps} steps, "
                f"and a run has {MAX_STEPS} at most"
            )
        if self.server.noise_corrected and (self.optimizer != "sgd" or self.momentum):
            raise ValueError(
                "server.noise_corrected=true needs optimizer=sgd and momentum=0 at the sites: else the variance of the "
                "noise in what they send is not known"
            )
        return self


class EvaluationConfig(Frozen):
    """How good an adapter is on the sites' own records, of persons who do not train: noised sums, charged for."""

    every: int | None = Field(None, ge=1, le=MAX_ROUNDS)
    """Score the adapter on the sites' evaluation records after so many rounds each, before the first round and after
    the last. Null: never.
    """
    epsilon: float | None = Field(None, ge=1e-6, le=1e9)
    """Target for all scores of a run together. Whoever pays it does not pay for training. Null: `privacy.epsilon`."""
    noise_multiplier: float | None = Field(None, ge=0.01, le=1e6)
    """Standard deviation of the noise of one score, where a unit counts 1. Null: calibrated to meet `epsilon`."""
    patience: int | None = Field(None, ge=1, le=MAX_ROUNDS)
    """End the training after so many scores in a row that are no better than the best. Null: never."""

    def scores_in(self, exchanges: int, rounds: int) -> int:
        """Return how many of the first exchanges of a run of so many rounds have a score; the closing one has."""
        if self.every is None or exchanges < 1:
            return 0
        closing = exchanges > rounds and rounds % self.every != 0
        return (exchanges - 1) // self.every + 1 + closing

    @model_validator(mode="after")
    def _validate(self) -> "EvaluationConfig":
        if self.every is None and (self.patience or self.noise_multiplier or self.epsilon):
            raise ValueError("epsilon, noise_multiplier and patience belong to scores: set every to a number of rounds")
        return self


class AttackConfig(Frozen):
    """The attack that is tried on a run (one-run audit, Steinke, Nasr and Jagielski 2023)."""

    canaries: int = Field(0, ge=0, le=MOST_CANARIES)
    """Made-up records at every site, each trained on with probability 1/2, in secret; in the end it guesses which.
    0: no attack.
    """


def check_scores(training: TrainingConfig, evaluation: EvaluationConfig) -> None:
    """Raise ValueError if a run needs scores that it does not have."""
    if training.keep == "best" and evaluation.every is None:
        raise ValueError(
            "training.keep=best compares scores at the sites, and there are none. Set evaluation.every to a number of "
            "rounds, or training.keep=last"
        )


def check_groups(groups: int, poisoned: int, privacy: PrivacyConfig, training: TrainingConfig) -> None:
    """Raise ValueError if so many groups, 0 or 1 being none, are no defence against so many poisoned sites.

    Every poisoned site may be in a group of its own, and the honest ones must be more than half of the groups.
    """
    if groups <= 1:
        return
    if privacy.mode != "distributed":
        raise ValueError(
            f"federation.groups={groups}: privacy.mode={privacy.mode} has no sums of several sites. Leave groups out, "
            "or choose privacy=distributed"
        )
    if poisoned < 1 or groups < 2 * poisoned + 1:
        raise ValueError(
            f"federation.groups={groups}: with federation.poisoned_sites={poisoned}, at least "
            f"{2 * max(1, poisoned) + 1} groups are needed, more than twice as many and three at least"
        )
    if training.server.noise_corrected:
        raise ValueError(
            "training.server.noise_corrected=true: the variance of the noise in a median of groups is not known. Set "
            "it to false, or federation.groups=null"
        )


def _encoding(name: str) -> str:
    """Return the name by which Python knows an encoding of text; a byte order mark belongs to no encoding."""
    try:
        found = codecs.lookup(name)
        "a".encode(name).decode(name)
    except (LookupError, UnicodeError, ValueError, TypeError):
        raise ValueError("expected an encoding of text, such as utf-8, cp949, utf-16 or latin-1") from None
    return found.name.removesuffix("-sig")


class FileConfig(Frozen):
    """How text files of records are written: set and never guessed, so that no record changes how others are read."""

    encoding: Annotated[str, AfterValidator(_encoding)] = "utf-8"
    """Encoding of .jsonl, .json and .csv files: `cp949` for many Korean ones; `utf-16` in simulations only."""
    separator: str = Field(",", pattern='^([^\\w\\s"]|tab)$')
    """Sign between the columns of .csv files, such as `;`. A tab is written `tab`."""

    @property
    def delimiter(self) -> str:
        """The separator itself."""
        return "\t" if self.separator == "tab" else self.separator


class TextConfig(FileConfig):
    """How a record becomes text."""

    prompt: str | None = None
    """Template of the given part, such as `'Q: {question} A:'`. No loss falls on it. Null: every token of `text` is
    learned.
    """
    text: str | None = Field(None, min_length=1)
    """Template of the part to learn, or of the text to classify; `{column}` is a column of the records."""
    columns: dict[str, Column] = Field(default={})
    """Names for columns that a template cannot name, such as `{q: '질문 내용(필수)'}` for `{q}`."""
    chat: bool = False
    """Put prompt and text into the chat template of the model."""
    messages: Column | None = None
    """Column of whole conversations: lists of objects with `role` and `content`. They go through the chat template,
    and the loss falls on the turns of the assistant. Takes the place of `prompt` and `text`.
    """
    system: str | None = Field(None, min_length=1)
    """Chat: the system turn, before a conversation that has none of its own."""
    label: Column | None = None
    """Classification: the column of the label."""

    @model_validator(mode="after")
    def _validate_text(self) -> "TextConfig":
        if self.text is None and self.messages is None:
            raise ValueError("data.text: a value is needed, such as '{answer}'; or data.messages, for conversations")
        if self.messages is not None and self.label is not None:
            raise ValueError("data.messages is for generating text, data.label for classification: choose one")
        if self.system is not None and not self.chats:
            raise ValueError("data.system is a turn of a chat: it needs data.chat=true or data.messages")
        return self

    @property
    def chats(self) -> bool:
        """Whether text goes through the chat template of the model."""
        return self.chat or self.messages is not None


class HeldoutConfig(TextConfig):
    """The public held-out set, on which the server evaluates, and what reports say of the data."""

    heldout: str | None = None
    """PUBLIC held-out records: a .jsonl, .json, .csv or .parquet file, a folder of them, a hub name, or `pkg://`. Null:
    there are none; the sites can evaluate on records of their own (`evaluation.every`).
    """
    heldout_split: str = "test"
    """Split of the held-out records, if they come from the hub."""
    heldout_limit: int | None = Field(None, ge=1)
    """Evaluate on so many held-out records, evenly spaced. Null: on all."""
    description: str = ""
    """PUBLIC: one sentence about the data, for the model card."""
    samples: int = Field(3, ge=0)
    """Held-out questions that are answered before and after training, for the summary."""


class RecordsConfig(TextConfig):
    """The records of sites."""

    train: str = Field(min_length=1)
    """Records: a .jsonl, .json, .csv or .parquet file, a folder of them, a hub name, or `pkg://`. In site.yaml, a path
    is relative to that file.
    """
    train_split: str = "train"
    """Split of the records, if they come from the hub."""
    unit: Column | None = None
    """Column that names the person a record belongs to. Needed if the unit is a person."""


class DataConfig(HeldoutConfig, RecordsConfig):
    """The records of simulated sites as well."""

    max_bad: int = Field(0, ge=0)
    """So many records that cannot be used are left out, and said. With more the run stops before its first round and
    names them with file and line.
    """


class PartitionConfig(Frozen):
    """How one data set becomes several sites (flwr-datasets)."""

    by: Literal["natural", "iid", "dirichlet"] = "natural"
    """`natural`: a column names the site. `iid`: at random. `dirichlet`: at random, with different labels at each site.
    """
    column: Column | None = None
    """`natural`: the column that names the site. `dirichlet`: the column of the label."""
    sites: int | None = Field(None, ge=1)
    """Number of sites, for `iid` and `dirichlet`."""
    alpha: float = Field(0.5, gt=0)
    """Concentration of the Dirichlet distribution. Smaller: the sites differ more."""

    @model_validator(mode="after")
    def _validate(self) -> "PartitionConfig":
        if self.by != "iid" and self.column is None:
            raise ValueError(f"by={self.by} needs partition.column")
        if self.by != "natural" and self.sites is None:
            raise ValueError(f"by={self.by} needs partition.sites")
        return self


class QuorumConfig(Frozen):
    """What the server does when some sites do not answer, and what the others weigh."""

    quorum: int | None = Field(None, ge=1)
    """Answers without which a round does not count; with groups, of each group. Null: half of the sites; two thirds in
    mode distributed.
    """
    round_timeout: float = Field(600.0, gt=0)
    """Seconds for a whole round, all sites."""
    weights: BySite = Field(default={})
    """PUBLIC weights by site, such as `{seoul-gangnam: 2.0}`. A site that is not named weighs 1."""
    aggregation: Printable = Field("mean", min_length=1, max_length=100)
    """The rule that makes one update of the sites' updates, by its name in `server/aggregate.py`."""
    groups: int | None = Field(None, ge=1, le=MAX_HOLDERS)
    """Mode distributed: divide the sites into so many groups, each with a sum and noise of its own. The median counts.
    Null or 1: off.
    """
    poisoned_sites: int = Field(1, ge=1, le=MAX_HOLDERS)
    """With groups: so many sites may send anything. It takes more than twice as many groups."""
    gate: float | None = Field(None, ge=0, le=100)
    """Do not apply a round that raises the held-out loss by more than this share above the lowest so far. Null: off."""

    @model_validator(mode="after")
    def _validate(self) -> "QuorumConfig":
        if any(weight <= 0 for weight in self.weights.values()):
            raise ValueError("weights must be positive; leave a site out of the federation instead of weighing it 0")
        return self


class FederationConfig(QuorumConfig):
    """A federation of simulated sites."""

    backend: Literal["in-process", "ray"] = "in-process"
    """`in-process`: all sites on this machine. `ray`: Flower's simulation engine, on GPUs and several machines too."""
    partition: PartitionConfig
    """How the records become those of sites."""
    processes: int | None = Field(None, ge=1, le=1024)
    """In-process: processes that train sites at the same time. Null: one for each core."""
    cpus_per_site: float = Field(1.0, gt=0)
    """Ray: CPU cores that one process of sites takes."""
    gpus_per_site: float = Field(0.0, ge=0)
    """Ray: GPUs that one process of sites takes."""


class ComputeConfig(Frozen):
    """With what a process computes; changes no result."""

    micro_batch: int = Field(64, ge=1)
    """Records in one forward pass. Changes memory and time, not the result."""
    threads: int | None = Field(None, ge=1, le=4096)
    """Threads of PyTorch on the CPU. Null: PyTorch's own choice; where processes of a simulation train sites, the cores
    are shared out among them."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:0` and so on."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time, the same result."""


class SiteConfig(ComputeConfig):
    """What a simulated site decides for itself."""

    epsilon: float | None = Field(None, gt=0)
    """Total budget of each simulated site. Null: what the plan asks for."""
    budgets: BySite = Field(default={})
    """Budgets by site, instead of `epsilon`, such as `{busan-haeundae: 4.0}`."""
    evaluation_share: float | None = Field(None, ge=0, le=0.5)
    """Share of every site's privacy units that evaluate and never train. Null: 0.1 if the run has scores
    (`evaluation.every`), else none.
    """
    min_units: int | None = Field(None, ge=1)
    """A site with fewer units takes no part. Null: one expected batch, at most half of `privacy.units_per_site`."""
    folder: str | None = Field(None, min_length=1)
    """Keep the sites' ledgers and keys in this folder over several runs. Null: in the folder of the run, so that a new
    run has a new budget.
    """

    @model_validator(mode="after")
    def _validate(self) -> "SiteConfig":
        if any(epsilon <= 0 for epsilon in self.budgets.values()):
            raise ValueError("budgets must be positive")
        return self


class RunConfig(Frozen):
    """What every run of a federation is configured by, simulated or deployed."""

    name: Printable = Field(min_length=1, max_length=200)
    """Folder of the run under `output`. Null: date and time."""
    seed: Seed = 0
    """PUBLIC seed of partition and initial adapter. It never seeds noise or sampling of a private run."""
    resume: bool = False
    """Continue the run `name` where it stopped."""
    model: ModelConfig
    data: HeldoutConfig
    adapter: AdapterConfig
    privacy: PrivacyConfig
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    audit: AttackConfig = AttackConfig()
    federation: QuorumConfig
    site: ComputeConfig

    @model_validator(mode="after")
    def _validate_run(self) -> "RunConfig":
        if self.name in (".", "..") or set(self.name) & set("/\\\0"):
            raise ValueError(
                f"name={self.name!r} is no name of a folder. Leave out / and \\; output=... says where it lies"
            )
        if self.model.task == "classification" and self.data.label is None:
            raise ValueError("data.label: task=classification needs the column of the label")
        if self.model.task == "classification" and (self.data.prompt or self.data.chats):
            raise ValueError("data.prompt, data.chat and data.messages belong to task=causal-lm")
        if self.data.chat and not self.data.prompt:
            raise ValueError("data.chat=true needs data.prompt, the user's turn")
        check_scores(self.training, self.evaluation)
        check_groups(self.federation.groups or 1, self.federation.poisoned_sites, self.privacy, self.training)
        if self.federation.gate is not None and self.data.heldout is None:
            raise ValueError(
                f"federation.gate={self.federation.gate:g} compares losses on a held-out set, and there is none. "
                "Name one (data.heldout), or set federation.gate=null"
            )
        if len(self.name.encode()) > 255:
            raise ValueError("name is longer than the 255 bytes of a folder name")
        if self.privacy.mode == "distributed" and self.federation.weights:
            raise ValueError(
                "federation.weights: with privacy.mode=distributed only the sum is seen, so all weigh 1. Leave them "
                "out, or choose privacy=local"
            )
        if self.privacy.mode == "distributed" and self.federation.aggregation != "mean":
            raise ValueError(
                f"federation.aggregation={self.federation.aggregation}: with privacy.mode=distributed only the sum is "
                "seen. Choose mean, or privacy=local"
            )
        return self


class DeploymentConfig(RunConfig):
    """A run of a deployed federation; `site` says with what the server evaluates."""

    @model_validator(mode="after")
    def _validate(self) -> "DeploymentConfig":
        if self.privacy.units_per_site is None:
            raise ValueError(
                "privacy.units_per_site: give the nominal number of privacy units a site. It is public, and the same "
                "for all: the server does not know what the sites hold"
            )
        return self


class AuditConfig(AttackConfig):
    """The audit of a simulated run."""

    report: bool = True
    """Write the audit report at the end."""


class SimulationConfig(RunConfig):
    """A whole simulated federation, as composed by Hydra."""

    output: str = Field("runs", min_length=1)
    """Folder of the runs' folders."""
    audit: AuditConfig = AuditConfig()
    data: DataConfig
    federation: FederationConfig
    site: SiteConfig

    @model_validator(mode="after")
    def _validate(self) -> "SimulationConfig":
        if self.privacy.unit == "person" and self.data.unit is None:
            raise ValueError(
                "data.unit: privacy.unit=person needs the column that names the person. Name it, or set "
                "privacy.unit=record"
            )
        return self

    @property
    def evaluation_share(self) -> float:
        """Share of the sites' privacy units that evaluate."""
        if self.site.evaluation_share is not None:
            return self.site.evaluation_share
        return SHARE if self.evaluation.every is not None else 0.0

    def budget(self, site: str) -> float:
        """Return the total epsilon that a site permits."""
        general = self.site.epsilon if self.site.epsilon is not None else self.privacy.epsilon
        return self.site.budgets.get(site, general)
