"""Every error that `tvc` raises on purpose, each rendered as the same five lines.

    error[TVC110] unknown-key: step 0 has a key that the policy language does not know
      where: policy.yaml:4, steps[0].selekt
      got:   selekt
      want:  one of at, exit, rest, scope, score, select
      fix:   write "select"

`where`, `got`, `want` and `fix` are mandatory, so that no message leaves its reader without a next step.
The command line turns the class into an exit code (`exit_code`); the library only raises.
"""

from __future__ import annotations


class TvcError(Exception):
    """Base of all errors; `code` and `slug` identify the mistake, the five lines explain it."""

    code = "TVC000"
    slug = "error"
    exit_code = 1

    def __init__(self, summary: str, *, where: str, got: object, want: object, fix: str, slug: str | None = None):
        self.summary, self.where, self.got, self.want, self.fix = summary, where, str(got), str(want), fix
        self.slug = slug or type(self).slug
        super().__init__(self.render())

    def render(self) -> str:
        lines = (("where", self.where), ("got", self.got), ("want", self.want), ("fix", self.fix))
        body = "\n".join(f"  {name + ':':7}{' '.join(text.split())}" for name, text in lines)
        return f"error[{self.code}] {self.slug}: {self.summary}\n{body}"


class PolicyError(TvcError):
    """The policy text is wrong by itself: syntax, unknown key, bad value, bad parameter."""

    code, slug, exit_code = "TVC110", "bad-policy", 2


class SiteError(TvcError):
    """The policy is well formed, but this model cannot do it: no such layer, no such tap, a cut without meaning."""

    code, slug, exit_code = "TVC120", "bad-site", 2


class WeightsError(TvcError):
    """The weights that a policy names are not there, or are not those that its step takes in this model."""

    code, slug, exit_code = "TVC125", "bad-weights", 2


class ArgumentError(TvcError):
    """An argument of a command or of a public function is wrong."""

    code, slug, exit_code = "TVC130", "bad-argument", 2


class ModelError(TvcError):
    """The model cannot be loaded, or is not a vision-language model."""

    code, slug, exit_code = "TVC210", "bad-model", 2


class InputError(TvcError):
    """The tensors or files given to a compiled model do not fit it."""

    code, slug = "TVC220", "bad-input"


class TraceError(TvcError):
    """`torch.export` cannot trace a component, or a part of the graph that is needed was not found in it."""

    code, slug = "TVC310", "not-traceable"


class PassError(TvcError):
    """A pass ran out of order, matched nothing, or broke its contract."""

    code, slug = "TVC320", "pass-failed"


class ExportError(TvcError):
    """A target's exporter refused the program."""

    code, slug = "TVC410", "not-exportable"


class ArtifactError(TvcError):
    """An artifact directory is incomplete, changed or unsafe."""

    code, slug = "TVC420", "bad-artifact"


class VerificationError(TvcError):
    """A compiled model differs from its definition; `report` holds every comparison."""

    code, slug, exit_code = "TVC510", "differs", 3

    def __init__(self, summary: str, *, report: object = None, **lines: object):
        self.report = report
        super().__init__(summary, **lines)  # type: ignore[arg-type]
