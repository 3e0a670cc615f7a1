"""How an imported model wants its prompts: what begins and ends a text, and its chat template.

It lies beside the run's configuration, as data; a run without it has plain prompts. What its folder
said of texts is kept with it for an export, and so is where the model came from: runs that start
with its weights have both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from modtrain.common.atomic_io import write_text
from modtrain.common.errors import CheckpointError, DataError
from modtrain.common.reading import UnreadableError, read_json
from modtrain.interop.original_files import CONFIG_NAME, TOKENIZER_CONFIG, check_files
from modtrain.training.run_directory import RunDirectory

_MAX_BYTES = 2**22
_MAX_TEMPLATE_BYTES = 2**19
ORIGIN = ("source", "model_type", "files", "tokenizer_sha256")
"""What is kept of the record of an import."""
_ANY_TOKENIZER = "PreTrainedTokenizerFast"


def checked_template(template: object, where: str) -> str | None:
    """Return a chat template as it is. where: its file and key.

    Raises:
        DataError: it is no text, or larger than a run keeps.
    """
    if template is None:
        return None
    if not isinstance(template, str):
        raise DataError(f"{where} is {template!r:.60}, not a text")
    if len(json.dumps(template)) > _MAX_TEMPLATE_BYTES:
        raise DataError(
            f"{where} is larger than {_MAX_TEMPLATE_BYTES:,} bytes\nremedy: take a shorter template"
        )
    return template


@dataclass(frozen=True)
class PromptFormat:
    """What a prompt gets.

    begin_ids: tokens before a prompt without a template. end_ids: tokens that end an answer, beside
    the end-of-document token. chat_template: in Jinja; None: there is none. special_tokens: names
    that the template knows, such as ``bos_token``, and their texts. files: of the imported folder,
    by name, see `modtrain.interop.original_files`. origin: what was imported, with the keys
    `ORIGIN`; empty in runs of earlier versions.
    """

    begin_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, run: Path) -> PromptFormat:
        """Return the format of the run in the directory ``run``; plain prompts without a file.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = RunDirectory(run).prompt_format
        if not path.exists():
            return cls()
        try:
            return cls.of(read_json(path, _MAX_BYTES))
        except (UnreadableError, TypeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): import the model again") from None

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> PromptFormat:
        """Return the format with these values. Raises ValueError if they are no format."""
        begin, end = ([*content[key]] for key in ("begin_ids", "end_ids"))
        template, special = content["chat_template"], dict(content["special_tokens"])
        if not all(type(number) is int and number >= 0 for number in begin + end):
            raise ValueError("a token's number is none")
        if not all(isinstance(text, str) for text in (template or "", *special, *special.values())):
            raise ValueError("a text is none")
        files, origin = check_files(content.get("files", {})), dict(content.get("origin", {}))
        return cls(tuple(begin), tuple(end), template, special, files, origin)

    @property
    def config_ids(self) -> Mapping[str, Any]:
        """The numbers of special tokens of the model's ``config.json``; empty: none of its own."""
        # Runs that an earlier version imported know the end tokens alone.
        known = {"eos_token_id": [*self.end_ids]} if self.end_ids else {}
        ids: Mapping[str, Any] = self.files.get(CONFIG_NAME, known)
        return ids

    def of_tokenizer(self, sha256: str) -> PromptFormat:
        """Return the format of a run with this ``tokenizer.json``: plain if it is another one."""
        own = self.origin.get("tokenizer_sha256", sha256)
        return self if own == sha256 else PromptFormat(origin=self.origin)

    def files_for(self, kind: str) -> dict[str, Any]:
        """Return the files of a folder whose architecture is ``kind``."""
        files = dict(self.files)
        own = files.get(TOKENIZER_CONFIG)
        if own is not None and kind != self.origin.get("model_type"):
            # Without a class transformers would take one by the name of the architecture.
            files[TOKENIZER_CONFIG] = {"tokenizer_class": _ANY_TOKENIZER, **own}
        return files

    def write(self, run: Path) -> None:
        """Write the format into the run's directory.

        Raises:
            DataError: it is larger than what is read.
        """
        content = json.dumps(asdict(self), indent=1)
        if len(content) > _MAX_BYTES:
            raise DataError(
                "the model's special tokens and chat template are larger than"
                f" {_MAX_BYTES:,} bytes\nremedy: take them out of tokenizer_config.json"
            )
        write_text(RunDirectory(run).prompt_format, content)

    def chat_ids(self, tokenizer: Tokenizer, prompt: str) -> list[int]:
        """Return the tokens of a conversation in which the user has said ``prompt``.

        Raises:
            DataError: the template does not take it.
        """
        text = self.chat_text(tokenizer, [{"role": "user", "content": prompt}])
        return tokenizer.encode(text, add_special_tokens=False).ids

    def chat_text(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool = True,
    ) -> str:
        """Return a conversation as the template writes it.

        messages: each with ``role`` and ``content``. add_generation_prompt: end with what begins an
        answer; False: the last message goes on.

        Raises:
            DataError: the template does not take it.
        """
        # transformers runs the template without access to Python, and takes seconds to import.
        from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

        template = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **self.special_tokens)
        try:
            text: str = template.apply_chat_template(
                list(messages),
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                tokenize=False,
            )
        except Exception as error:  # of Jinja, or raised by the template
            raise DataError(f"the model's chat template fails: {error}") from error
        return text
