"""Every error that penstock raises on purpose.

::

    PenstockError
    ├── UnsupportedError        the kernel, a container or a missing privilege refuses the mechanism
    ├── CheckpointError         a model file is not what its format promises
    ├── TemplateError           an I/O template cannot be used
    │   ├── TemplateFormatError     damaged, or written by another version
    │   └── TemplateStaleError      the model's files are not the recorded ones
    ├── PolicyError             a policy raised, returned nonsense or could not be imported
    ├── ObserverError           an observer could not start or lost its source
    ├── KVError                 part of a KV cache cannot be had: damaged, or the device failed
    │   └── SessionError            a saved session is damaged, another model's, or of another version
    ├── RegionError             a region is damaged, another's, in use, or would destroy something
    └── ReportError             a run's report is damaged or of another version

Messages name the path, the offset where there is one, what was wanted, what was found and what to do.
Errors of the operating system stay OSError where the caller asked for that very call.
"""

from __future__ import annotations


class PenstockError(Exception):
    """Base of all errors below."""


class UnsupportedError(PenstockError):
    """The mechanism asked for does not exist here or is not permitted."""


class CheckpointError(PenstockError):
    """A model file breaks the rules of its format."""


class TemplateError(PenstockError):
    """An I/O template cannot be used."""


class TemplateFormatError(TemplateError):
    """The template file is damaged or of a version this penstock does not read."""


class TemplateStaleError(TemplateError):
    """The files on disk are not the ones that the template was recorded from."""


class PolicyError(PenstockError):
    """A policy raised, returned something unusable, or could not be imported."""


class ObserverError(PenstockError):
    """An observer could not be started, or lost what it observes."""


class KVError(PenstockError):
    """Part of a KV cache cannot be stored or read back as it was: it is damaged, or the device failed."""


class SessionError(KVError):
    """A saved session is damaged, belongs to another model or other tokens, or has another version."""


class RegionError(PenstockError):
    """A region is damaged, belongs to someone else, is in use, or making it would destroy something."""


class ReportError(PenstockError):
    """A report file is damaged, incomplete, or of a version this penstock does not read."""
