"""Every error that fedllm raises on purpose.

    FedllmError
    ├── ConfigError        the configuration asks for something unknown, ill-typed or impossible
    ├── DataError          records that cannot be read or used as configured
    ├── ModelError         a base model or adapter that cannot be loaded, adapted or trained
    │   └── Diverged       the noised result of training is not finite
    ├── PrivacyError       a step that would weaken the stated guarantee
    │   ├── BudgetExceeded the site's privacy budget does not admit the request
    │   └── SecAggError    a step of secure aggregation that does not fit what this site did before
    ├── LedgerError        the site's durable record of spent budget cannot be used
    ├── ChainError         a ledger or run log that was altered, or is not signed by whom it should be
    ├── MessageError       bytes from the other side that are not a valid message
    │   └── SpecMismatch   an update made for another adapter
    ├── FolderError        a folder or file of an installation that cannot be read, written or trusted
    ├── CryptoError        keys, certificates, signatures or sealed bytes that are not what they should be
    ├── ReleaseError       a released model that is not what was signed, or may not be used as asked
    │   └── Refused        a request to a served model that is not answered
    ├── CheckpointError    a checkpoint that cannot be written, read or continued
    ├── FederationError    the federation cannot go on
    │   └── QuorumLost     fewer sites answered than the quorum
    ├── Cancelled          nobody waits for the answer any more; nothing was released
    └── Halted             a site failed while it used records, and answers nothing until its owner acts

Each text says what was found (name=value), what was expected, and what to do.
"""

from collections.abc import Mapping


def first_line(error: BaseException) -> str:
    """Return the beginning of what another library's error says: one line of 300 characters at most."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class FedllmError(Exception):
    """Base of all errors that a user can act on; the command line prints it without a traceback."""


class ConfigError(FedllmError):
    """The configuration asks for something unknown, ill-typed or impossible."""


class DataError(FedllmError):
    """Records cannot be read or used as configured."""


class ModelError(FedllmError):
    """A base model or adapter cannot be loaded, adapted or trained."""


class Diverged(ModelError):
    """The result of training, noise included, is not finite."""


class PrivacyError(FedllmError):
    """The requested step would weaken the stated privacy guarantee."""


class BudgetExceeded(PrivacyError):
    """The site's privacy budget does not admit the request."""


class SecAggError(PrivacyError):
    """A step of secure aggregation does not fit what this site advertised, shared, uploaded or revealed before."""


class LedgerError(FedllmError):
    """The site's durable record of spent budget cannot be used."""


class ChainError(FedllmError):
    """A ledger or run log was altered, or is not signed by whom it should be."""


class MessageError(FedllmError):
    """Bytes from the other side are not a valid message."""


class SpecMismatch(MessageError):
    """An update or adapter state was made for another adapter."""


class FolderError(FedllmError):
    """A folder or file of an installation cannot be read, written or trusted."""


class CryptoError(FedllmError):
    """Keys, certificates, signatures or sealed bytes are not what they should be."""


class ReleaseError(FedllmError):
    """A released model is not what was signed, or may not be used as asked."""


class Refused(ReleaseError):
    """A request to a served model is not answered; its text is for the sender, and quotes nothing of the request."""

    def __init__(self, status: int, text: str, code: str, headers: Mapping[str, str] | None = None) -> None:
        """`status` is HTTP's, `code` a word for programs, `headers` go beside the answer."""
        super().__init__(text)
        self.status, self.code, self.headers = status, code, dict(headers or {})


class CheckpointError(FedllmError):
    """A checkpoint cannot be written, read or continued."""


class FederationError(FedllmError):
    """The federation cannot go on."""


class QuorumLost(FederationError):
    """Fewer sites answered than the quorum asks for."""


class Cancelled(FedllmError):
    """Nobody waits for the answer any more, so the work was given up before anything was released."""


class Halted(FedllmError):
    """A site failed, or was killed, while it used records; it answers nothing until its owner acts."""
