"""The special tokens and the chat format that SmolLM2-135M-Instruct and its tiny twin share.

ChatML: every message is `<|im_start|>role`, a line break, the text, `<|im_end|>`, a line break. An answer
ends with `<|im_end|>`, so that is the end-of-sequence token, and it pads as well.
"""

from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence

SPECIAL_TOKENS = (  # their place here is their id
    "<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename> <gh_stars> "
    "<issue_start> <issue_comment> <issue_closed> <jupyter_start> <jupyter_text> <jupyter_code> "
    "<jupyter_output> <jupyter_script> <empty_output>"
).split()
UNK, BOS, EOS = SPECIAL_TOKENS[:3]
ROLES = {"unk_token": UNK, "bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
MAX_LENGTH = 8192

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pre_tokenizer() -> PreTokenizer:
    """How SmolLM2 cuts text before its merges: every digit alone, then GPT-2's rule on bytes."""
    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
