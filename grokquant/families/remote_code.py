"""A family's classes as one file beside the weights, for transformers with `trust_remote_code`.

The file is the text of our own modules, so that nothing is written twice: each module up to its
SEAM, above which it imports nothing of this package.
"""

import inspect
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import ModuleType

from grokquant.version import __version__

SEAM = "# Files of `output.remote_code` end here."


@dataclass(frozen=True)
class RemoteCode:
    """`file` is made of `modules`, which define the classes called `config`, `model` and
    `tokenizer`; `title` names the model."""

    title: str
    file: str
    modules: tuple[ModuleType, ...]
    config: str
    model: str
    tokenizer: str

    def text(self) -> str:
        """The whole file, the same for every model of the family."""
        head = (
            f'"""{self.title} for transformers 5.17 and later, by trust_remote_code=True.\n\n'
            f"Written by grokquant {__version__}, which it does not import; `grokquant verify`\n"
            'checks that it is unchanged. Licence: Apache-2.0.\n"""\n'
        )
        parts = [inspect.getsource(module).partition(SEAM)[0] for module in self.modules]
        return "\n\n".join([head, *(part.strip() + "\n" for part in parts)])

    @property
    def auto_map(self) -> dict[str, str]:
        """What config.json says of the file."""
        return {
            "AutoConfig": self._reference(self.config),
            "AutoModelForCausalLM": self._reference(self.model),
        }

    @property
    def tokenizer_auto_map(self) -> dict[str, list[str | None]]:
        """What tokenizer_config.json says of it: the class in Python, and none in Rust."""
        return {"AutoTokenizer": [self._reference(self.tokenizer), None]}

    def _reference(self, name: str) -> str:
        return f"{PurePosixPath(self.file).stem}.{name}"
