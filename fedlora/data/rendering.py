"""From prompts, conversations and preferences to the one text that a causal model reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedlora.data.texts import Conversation, Instruction, Preference, Text, Turn
from fedlora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A sequence as text. heads: its beginnings up to where each completion begins and, but for the last one, ends."""

    whole: str
    heads: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """How prompts become text. template: chat, plain, a text with {prompt}, or None: chat for conversations alone."""

    tokenizer: "PreTrainedTokenizerBase"
    template: str | None

    def chats(self, text: Text) -> bool:
        """Whether the chat template writes this record; it then writes the special tokens, too."""
        return self.template == "chat" or isinstance(text, Conversation)

    def rendered(self, text: Text) -> tuple[Rendered, ...]:
        """The sequences of a record: two of a preference, the preferred one first; else one.

        Raises:
            DataError: there is no chat template, or it cannot say where a completion begins.
        """
        match text:
            case Instruction(prompt=prompt, completion=completion):
                return (self._answered(prompt, completion),)
            case Preference(prompt=prompt, chosen=chosen, rejected=rejected):
                return self._answered(prompt, chosen), self._answered(prompt, rejected)
            case Conversation(turns=turns):
                return (self._conversation(turns),)
        raise DataError(f"a {type(text).__name__} has no completion; name data.prompt and data.completion")

    def _answered(self, prompt: str, completion: str) -> Rendered:
        if self.template == "chat":
            turns = Turn(role="user", content=prompt), Turn(role="assistant", content=completion)
            return self._conversation(turns)
        plain = self.template is None or self.template == "plain"
        # Not str.format: other braces in the template, and those of prompts, are text.
        head = prompt if plain else str(self.template).replace("{prompt}", prompt)
        return Rendered(whole=head + completion, heads=(head,))

    def _conversation(self, turns: Sequence[Turn]) -> Rendered:
        whole = self._chat(turns)
        heads: list[str] = []
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                heads += [self._chat(turns[:number], ask=True), self._chat(turns[: number + 1])]
        if not all(whole.startswith(head) for head in heads):
            raise DataError(
                "the chat template writes earlier turns differently once others follow, so it cannot be told which "
                "tokens are the assistant's; cut each conversation into ones with a single answer, at the end"
            )
        return Rendered(whole=whole, heads=tuple(heads[:-1]))

    def _chat(self, turns: Sequence[Turn], *, ask: bool = False) -> str:
        if not turns:
            return ""
        tokenizer: Any = self.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"task.template: the tokenizer of {tokenizer.name_or_path!r} has no chat template; write plain or a "
                "text with {prompt}, with data.prompt and data.completion; or take an instruction-tuned model"
            )
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
        except Exception as error:
            # A template is a program that a model brings along, and what it raises may be a record's words.
            raise DataError(
                f"the chat template refuses this conversation ({type(error).__name__}); most want user and assistant "
                "in turn, the user first, and some no system message"
            ) from None
