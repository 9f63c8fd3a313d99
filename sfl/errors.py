"""Every error that a user can cause or meet, by kind.

A message names what was wrong and what to do about it; the command line prints it without a traceback, with the kind's number,
as in `error SFL-602: ...`. Each number has a page, `docs/errors/SFL-602.md`, which `sfl errors 602` shows. The hundreds: 0 the
program and its machine, 1 settings, 2 data, 3 models, 4 adapters, 5 messages, 6 refusals, 7 peers that are away, 8 identity, 9
states on disk. A kind has a number of its own where its page would be another than that of its base. A number is never used for
something else.
"""

from __future__ import annotations


class SflError(Exception):
    """Base of all errors that `sfl` raises on purpose.

    `number` is the kind's; a refusal that came over the network has that of the peer's own error. A `lasting` one comes again
    however often the same is tried, until somebody has mended something.
    """

    number: int = 1
    lasting: bool = False

    @property
    def code(self) -> str:
        """The number as it is shown: `SFL-001`."""
        return error_code(self.number)


def error_code(number: int) -> str:
    """A number as it is shown, and as its page is called: `SFL-001`."""
    return f"SFL-{number:03d}"


class MachineError(SflError):
    """The operating system refused: a full disk, a folder that may not be written, no more memory or files."""

    number = 2


class MissingPackageError(SflError):
    """A package that this command needs is not installed."""

    number = 3
    lasting = True


class SettingsError(SflError):
    """A configuration file, an environment variable or a flag is wrong."""

    number = 100
    lasting = True


class ConfigFileError(SettingsError):
    """A configuration file is missing or cannot be read."""

    number = 101


class AddressError(SettingsError):
    """Something that should be HOST:PORT is not."""

    number = 102


class ListenError(SettingsError):
    """This machine does not let a daemon listen at the address that it is given."""

    number = 103
    lasting = False  # an address may come up after the daemon, as a VPN's does, and who has the port may go


class MemoryShortError(SettingsError):
    """What is asked of this machine does not fit its memory, by the planner's count."""

    number = 104


class DiskShortError(SettingsError):
    """What is asked of this machine does not fit its disk, or the part of it that settings allow."""

    number = 105


class EdgeMismatchError(SettingsError):
    """A device's settings contradict what its edge server describes."""

    number = 106


class DataError(SflError):
    """A data file is missing, empty, truncated or not in the format it claims."""

    number = 200
    lasting = True


class DataFileError(DataError):
    """A data file is missing, empty, cannot be read, or is no text at all."""

    number = 201


class DataFormatError(DataError):
    """A data file is not in the format it claims, is damaged, or lacks a column."""

    number = 202


class TooFewExamplesError(DataError):
    """There are too few examples for what they are to be divided into."""

    number = 203


class LabelError(DataError):
    """Labels are missing, or are not those that were agreed on."""

    number = 204


class ModelError(SflError):
    """A model cannot be loaded, cut or adapted as asked."""

    number = 300
    lasting = True


class ModelNotFoundError(ModelError):
    """There is no model of that name, or none that can be read."""

    number = 301


class UnsupportedModelError(ModelError):
    """A model of a kind, or with a cut, a task or a length of texts, that cannot be."""

    number = 302


class PrecisionError(ModelError):
    """This machine does not compute in the number format that is asked for."""

    number = 303


class ModelChangedError(ModelError):
    """An edge server provides another model than it did before."""

    number = 304


class DamagedModelError(ModelError):
    """Files of a model are damaged, truncated or of another version's format."""

    number = 305


class AdapterError(SflError):
    """An adapter's keys, shapes or values do not fit what they are to be combined with."""

    number = 400
    lasting = True


class UpdateError(AdapterError):
    """The update of one device cannot be used; those of others can."""

    number = 402

    def __init__(self, device: str, reason: str) -> None:
        super().__init__(reason)
        self.device = device


class WireError(SflError):
    """A message arrived that its receiver cannot accept: wrong dtype, shape, length, value or order."""

    number = 500


class DivergedError(WireError):
    """A loss or a gradient is not a finite number: training has gone astray."""

    number = 501


class RefusedError(SflError):
    """A peer refused a request; the message is the peer's own reason."""

    number = 600


class UnknownMemberError(RefusedError):
    """Someone acts who has not joined, perhaps because the server was started anew: joining (again) helps."""

    number = 601


class ModelDiffersError(RefusedError):
    """Two members of a federation have different base models."""

    number = 602


class TrainingDiffersError(RefusedError):
    """Two members of a federation are told to train in ways that do not go together."""

    number = 603


class FullError(RefusedError):
    """All expected devices have joined; there is no place for another."""

    number = 604


class NameTakenError(RefusedError):
    """Another member has that name, and is there."""

    number = 605


class FinishedError(RefusedError):
    """The federation has finished."""

    number = 606


class NotProvidedError(RefusedError):
    """The edge server does not provide what was asked of it."""

    number = 607


class SessionLostError(RefusedError):
    """The edge server knows nothing of a device's session any more."""

    number = 608


class LimitError(RefusedError):
    """A node has as much of a server as one node may have, or asks for more at once."""

    number = 609


class BusyError(LimitError):
    """A node has as much of a server as it may have at a time: when some of that is done, it may have more."""

    number = 610


class UnreachableError(SflError):
    """A peer did not answer within the time set for it."""

    number = 700


class WaitedError(UnreachableError):
    """Others did not come in time: devices to join, a version, another process."""

    number = 701


class StateError(SflError):
    """A file that a daemon keeps its state in is damaged, of another kind, or does not go with its settings."""

    number = 900


class StateWriteError(StateError):
    """A daemon's state cannot be written, because the disk is full, say; what was kept before is untouched."""

    number = 901


class StateDiffersError(StateError):
    """What a daemon kept was made with other settings than it has now, or belongs to another federation."""

    number = 902


class StateInUseError(StateError):
    """Another process works with the same folder."""

    number = 903


class IdentityError(SflError):
    """A certificate is not what it must be."""

    number = 800


class OwnCertificateError(IdentityError):
    """This node's own certificate, key or list of revoked certificates is missing, damaged or another node's."""

    number = 801
    lasting = True


class PeerIdentityError(IdentityError):
    """Who answers at an address is not who should be there, or does not accept this node's certificate."""

    number = 802


class CertificateTimeError(OwnCertificateError):
    """This node's own certificate or list of revoked ones is good, but not now: by its clock it has ended, or not begun."""

    number = 805
    lasting = False  # clocks are set, and certificates renewed, without a hand on this node


class PlaintextError(SettingsError):
    """An address outside this machine, and nothing that protects the connection."""

    number = 803


class RightsError(RefusedError):
    """A certificate does not allow what its node asked for."""

    number = 804


_EXTRAS = {"torch": "train", "transformers": "train", "peft": "train", "matplotlib": "demo", "bitsandbytes": "quant"}


def as_ours(error: BaseException) -> SflError | None:
    """What is said of `error`: a machine's refusal and a missing package have kinds here; None for what nobody has thought of."""
    if isinstance(error, SflError):
        return error
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            return None
        why = f"this needs {package}, which is not installed: pip install '.[{_EXTRAS[package]}]' in sfl's folder"
        return MissingPackageError(why)
    return MachineError(str(error)) if isinstance(error, OSError) else None  # a full disk, a folder that may not be written
