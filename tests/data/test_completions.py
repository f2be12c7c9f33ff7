"""Which tokens of a record are learned, and what is left of one that is too long."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedlora.config.task import CausalLm, Dpo
from fedlora.data import Records
from fedlora.data.completions import prompts
from fedlora.data.holdings import Holdings, open_holdings
from fedlora.data.records import concatenate
from fedlora.data.records import fingerprint as records_fingerprint
from fedlora.data.texts import Conversation, Instruction, Preference, Turn
from fedlora.data.tokenise import fingerprint, tokenise
from fedlora.errors import DataError

LETTERS = "abcdefgh"
CHAT = (
    "{{ '<s>' }}{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
FORGETFUL = (  # as some leave out what an earlier answer thought
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}h{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)


def letters(chat_template=None, eos="</s>", begins=True):
    """A tokenizer of single characters, with a token that begins every text if asked."""
    special = ["<unk>", "<s>", "</s>", "<user>", "<assistant>", "<system>"]
    vocabulary = {token: i for i, token in enumerate([*special, *LETTERS, " "])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token=eos,
        chat_template=chat_template,
    )


def sft(**changes):
    return CausalLm(kind="causal-lm", **changes)


def told(examples, tokenizer):
    """Each record as text, its learned part in brackets."""
    lines = []
    for start, stop in zip(examples.offsets[:-1], examples.offsets[1:], strict=True):
        line, inside = "", False
        tokens, marks = examples.input_ids[start:stop].tolist(), examples.trained[start:stop].tolist()
        for token, learned in zip(tokens, marks, strict=True):
            line += "[" * (learned and not inside) + "]" * (inside and not learned)
            line += tokenizer.convert_ids_to_tokens(token)
            inside = learned
        lines.append(line + "]" * inside)
    return lines


def of(*texts, task=None, tokenizer=None, most=64):
    tokenizer = tokenizer or letters()
    return told(tokenise(Records(texts=list(texts)), tokenizer, most, task or sft()), tokenizer)


ASK = Instruction(prompt="ab", completion="cd")
TALK = Conversation(
    turns=(
        Turn(role="system", content="h"),
        Turn(role="user", content="a"),
        Turn(role="assistant", content="b"),
        Turn(role="user", content="c"),
        Turn(role="assistant", content="d"),
    )
)


def test_a_prompt_is_read_and_a_completion_with_its_end_is_learned():
    assert of(ASK) == ["<s>ab[cd</s>]"]
    assert of(ASK, task=sft(template="plain")) == ["<s>ab[cd</s>]"]
    assert of(ASK, task=sft(template="h{prompt}g")) == ["<s>habg[cd</s>]"]
    assert of(ASK, task=sft(loss_on="all")) == ["[<s>abcd</s>]"]


def test_braces_in_a_prompt_are_text():
    assert of(Instruction(prompt="{prompt}", completion="a"), task=sft(template="b{prompt}"))[0].startswith(
        "<s>b<unk>"
    )


def test_a_chat_template_writes_the_turns_and_the_assistant_s_are_learned():
    chat = letters(CHAT)
    assert of(ASK, task=sft(template="chat"), tokenizer=chat) == ["<s><user>ab</s><assistant>[cd</s>]"]
    assert of(TALK, tokenizer=chat) == [
        "<s><system>h</s><user>a</s><assistant>[b</s>]<user>c</s><assistant>[d</s>]"
    ]


def test_a_pair_of_completions_is_two_sequences_of_one_record():
    tokenizer = letters()
    pairs = Records(
        texts=[
            Preference(prompt="a", chosen="bc", rejected="d"),
            Preference(prompt="e", chosen="f", rejected="gh"),
        ]
    )
    examples = tokenise(pairs, tokenizer, 64, Dpo(kind="dpo"))
    assert told(examples, tokenizer) == ["<s>a[bc</s>]<s>a[d</s>]", "<s>e[f</s>]<s>e[gh</s>]"]
    assert (len(examples), examples.sequences_per_record) == (2, 2)
    assert examples.firsts.tolist() == [5, 4]
    assert examples.sequence_lengths.tolist() == [5, 4, 4, 5]
    assert examples.footprints.tolist() == [10, 10]


@given(
    prompt=st.text(LETTERS, max_size=12),
    completion=st.text(LETTERS, min_size=1, max_size=12),
    most=st.integers(2, 20),
)
def test_a_long_record_keeps_its_completion_in_sight(prompt, completion, most):
    tokenizer = letters()
    examples = tokenise(
        Records(texts=[Instruction(prompt=prompt, completion=completion)]), tokenizer, most, sft()
    )
    assert len(examples.input_ids) <= most
    assert examples.trained[1:].any() and not examples.trained[0]
    line = "".join(tokenizer.convert_ids_to_tokens(examples.input_ids.tolist()))
    answer = f"{completion}</s>".replace("</s>", "/")
    line = line.replace("</s>", "/").removeprefix("<s>")
    room = max(0, most - 1 - len(answer))
    assert line == (prompt[max(0, len(prompt) - room) :] + answer)[: most - 1]


def test_of_a_conversation_the_last_answer_stays():
    assert of(TALK, tokenizer=letters(CHAT), most=7) == ["<s><user>c</s><assistant>[d</s>]"]


def test_without_a_first_token_one_of_the_prompt_stays():
    assert of(Instruction(prompt="abc", completion="defg"), tokenizer=letters(begins=False), most=3) == [
        "c[de]"
    ]


def test_prompts_to_go_on_from_are_what_the_model_was_trained_to_go_on_from():
    tokenizer = letters(CHAT)
    records = Records(texts=[ASK, Instruction(prompt="abcdefgh", completion="a" * 30)])
    found = prompts(records, tokenizer, 5, sft())
    assert ["".join(tokenizer.convert_ids_to_tokens(ids)) for ids in found] == ["<s>ab", "<s>efgh"]
    (talk,) = prompts(Records(texts=[TALK]), tokenizer, 64, sft())
    assert tokenizer.convert_ids_to_tokens(talk)[-4:] == ["<user>", "c", "</s>", "<assistant>"]


def test_without_a_chat_template_or_an_end_the_next_move_is_named():
    with pytest.raises(DataError, match=r"record 1: .*no chat template; write plain"):
        of(ASK, task=sft(template="chat"))
    with pytest.raises(DataError, match="no eos_token"):
        of(ASK, tokenizer=letters(eos=None))
    with pytest.raises(DataError, match=r"record 2: .*earlier turns differently"):
        of(Conversation(turns=TALK.turns[3:]), TALK, tokenizer=letters(FORGETFUL))


def test_marks_and_pairs_survive_whatever_is_done_with_records(tmp_path):
    pairs = [Preference(prompt="a" * (i % 3), chosen="b" * (i + 1), rejected="c") for i in range(6)]
    examples = tokenise(Records(texts=pairs), letters(), 64, Dpo(kind="dpo"))
    some = examples.select(np.array([4, 1]))
    joined = concatenate([examples.between(4, 5), examples.between(1, 2)])
    assert fingerprint(some) == fingerprint(joined) != fingerprint(examples)
    assert told(some, letters()) == [told(examples, letters())[i] for i in (4, 1)]
    Holdings.of(examples, {"a": np.array([0, 3]), "b": np.array([1, 2, 4, 5])}).save(tmp_path / "h")
    held = open_holdings(tmp_path / "h")
    assert fingerprint(held["b"]) == fingerprint(examples.select(np.array([1, 2, 4, 5])))
    assert held["b"].firsts is not None and held["b"].trained is not None


def test_what_is_learned_is_part_of_the_fingerprints():
    records = Records(texts=[ASK])
    tokens = {fingerprint(tokenise(records, letters(), 64, sft(loss_on=on))) for on in ("completion", "all")}
    assert len(tokens) == 2
    texts = (
        ASK,
        Instruction(prompt="abc", completion="d"),
        TALK,
        Preference(prompt="ab", chosen="cd", rejected="c"),
        "abcd",
    )
    assert len({records_fingerprint(Records(texts=[text])) for text in texts}) == len(texts)
