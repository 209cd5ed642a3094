"""site.yaml: what the owner of a site declares, permits and provides."""

from pydantic import Field, model_validator

from client.policy import SitePolicy
from fedllm.config import ComputeConfig, RecordsConfig
from fedllm.values import Frozen, Label, SiteName

HUB_NAME = r"[\w-][\w.-]*(/[\w.-]+)?"


class SiteData(RecordsConfig):
    """The site's records and how a record becomes text."""

    name: str | None = None
    """Name of the data set, after it was declared disjoint from all others (`fedllm ledger disjoint`)."""
    labels: tuple[Label, ...] = ()
    """Classification: every label that a record may have. A record with another is left out."""
    size: int | None = Field(None, ge=1, le=1_000_000_000)
    """About how many units (records or persons) there are. Plans are compared with it, never with the records."""

    @model_validator(mode="after")
    def _validate(self) -> "SiteData":
        if self.chat and not self.prompt:
            raise ValueError("chat: true needs a prompt, the user's turn")
        if self.label is not None and (self.prompt or self.chat):
            raise ValueError("label is for classification; prompt and chat are for generating text")
        if self.labels and self.label is None:
            raise ValueError("labels are those of a column: name it as label")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("labels holds a label twice")
        return self


class Resources(ComputeConfig):
    """What the site lends to training."""

    max_message_mb: int = Field(512, ge=1, le=65536)
    """The largest message that the site accepts, MB."""


class SiteFile(Frozen):
    """site.yaml."""

    name: SiteName
    """Name of the site, as in the server's roster."""
    data: SiteData
    policy: SitePolicy
    models: dict[str, str] = Field(default_factory=dict)
    """Models that plans may name, and where this site has them. A plan that names another one is refused."""
    model_cache: str | None = None
    """Folder in Hugging Face's cache format, for models given by their hub name. Nothing is ever downloaded."""
    resources: Resources = Resources()
    socket: str | None = None
    """Path of a unix socket where a relay of another system user connects for this process. Null: the site connects
    itself.
    """
    socket_group: str | None = None
    """Group that may use the socket."""

    @model_validator(mode="after")
    def _validate(self) -> "SiteFile":
        if self.policy.unit == "person" and self.data.unit is None:
            raise ValueError("data.unit: policy.unit=person needs the column that names the person")
        if self.socket_group is not None and self.socket is None:
            raise ValueError("socket: with socket_group it lies outside the site's folder, as /run/fedllm/link.sock")
        return self


TEMPLATE = """\
# The settings of this site. The server never sees this file and cannot change it.
# After a change: fedllm site check, which signs what it says of the records, and start the site anew.

name: {name}            # as in the roster of the server; after admission it stays

data:
  train: records.jsonl   # .jsonl, .json, .csv or .parquet, or a folder of them; from this file's folder, or absolute
  # name: branch-2026    # what the data set is called, once it was declared disjoint: fedllm ledger disjoint
  prompt: "{{question}}\\n" # the part that is given; {{column}} is a column of the records
  text: "{{answer}}"       # the part that is learned; for classification the text
  # chat: true           # put both into the model's chat template
  # messages: messages   # instead of both: a column of conversations, lists of role and content
  # system: Be brief.    # the system turn of a chat that has none
  # encoding: utf-8      # of .jsonl and .csv files; cp949 for many Korean ones
  # separator: ","       # between the columns of .csv files
  # columns: {{}}          # names for columns that a template cannot name: {{q: "질문 내용(필수)"}}
  # label: category      # classification: the column of the label, and no prompt
  # labels: [card, loan] #   and every label there may be: a record with another is left out
  # unit: customer       # the column that names the person a record belongs to
  # size: 1000           # about how many records (or persons) there are: plans are compared with it, never the records

policy:
  epsilon: 8.0           # the most privacy that these records may ever cost, over all runs
  delta: 1e-5            # the largest that a plan may promise: a tenth of 1 / the number of records, or less
  unit: record           # what is protected, and plans must: record, or person (needs data.unit)
  min_units: 100         # with a data.size below this, the site takes no part
  allow_unprotected: false  # true: also plans that are NOT PRIVATE
  # run_epsilon: 4.0      # the most that one run may cost
  # reply_quantum: 5     # seconds; updates leave at its multiples, and do not reveal how long training took
  # record_seconds: 0.1  # the longest that one record takes to train on; then no update leaves sooner than others could
  # period: {{days: 90, epsilon: 4.0}}  # the most that all runs of any 90 days may cost
  # The most that a plan may ask for, and the least and most noise in a step. These are the defaults:
  # max_rank: 64          # of an adapter
  # max_length: 1024      # tokens of a record; what is longer is cut
  # max_records_per_person: 64
  # max_local_steps: 100  # in a round
  # max_sampling_rate: 0.5  # share of the records that one step may use
  # min_noise_multiplier: 0.3
  # max_noise_multiplier: 10
  # train: [B]            # parts of an adapter that a plan may train
  # modes: [local]        # of privacy
  # quantize: [none]      # of model: none, int8 (8 bits), nf4 (4 bits)
  # min_sites: 3         # decline plans whose rounds count with fewer sites than this
  # colluding_sites: 1   # privacy.mode=distributed: decline plans that count with fewer sites on the server's side
  # peers:               # sites to add noise with (privacy.mode=distributed), and the fingerprints of their keys,
  #   busan: 1a2b 3c4d ...   # as each of them tells you itself: not as the server says

# The models that plans may name, and where this site has them. A plan that names another one is refused.
models: {{}}
#  Qwen/Qwen2.5-0.5B: /srv/models/qwen2.5-0.5b
# model_cache: /srv/huggingface   # for models that are given by their hub name; nothing is ever downloaded

resources:
  # threads: 4           # of the processor; without it, all
  device: auto           # auto, cpu, cuda, cuda:0 ...
  micro_batch: 64        # records in one pass: less needs less memory
  checkpointing: false   # true: recompute activations in the backward pass, which needs less memory and more time
  max_message_mb: 512

# Where a relay of another system user makes the connection, and this process has no network:
# socket: /run/fedllm/link.sock
# socket_group: fedllm   # a group that both are in
"""
