"""Tiny encoder-decoders, each with inputs."""

import json
import wave
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
    WhisperFeatureExtractor,
    WhisperTokenizer,
)

from support.tiny_models import VOCAB_SIZE, WORDS, tiny_checkpoint

SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 1}
SIZES: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
TEXT: dict[str, dict[str, Any]] = {
    "t5": T5,  # tied, and scaled before the head
    "mt5": {**T5, "tie_word_embeddings": False},
    "marian": {**SIZES, "max_position_embeddings": 128, "tie_word_embeddings": False},  # with a bias after the head
    "bart": {**SIZES, "max_position_embeddings": 128, "tie_word_embeddings": False},
}
SPEECH: dict[str, dict[str, Any]] = {
    "whisper": {
        **SIZES,
        "num_mel_bins": 8,
        "max_source_positions": 50,
        "max_target_positions": 96,
        "begin_suppress_tokens": None,
    },
    "speech_to_text": {
        **SIZES,
        "input_feat_per_channel": 8,
        "conv_channels": 16,
        "max_source_positions": 60,
        "max_target_positions": 96,
    },
}


def tiny_translator(model_type: str = "marian", **choices: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A random text-to-text model of 100 tokens, with two sentences, one of them padded."""
    config = AutoConfig.for_model(model_type, **{**TEXT[model_type], **SPECIAL, **choices}, vocab_size=VOCAB_SIZE)
    dense = _random(AutoModelForSeq2SeqLM, config)
    if hasattr(dense, "final_logits_bias"):
        dense.final_logits_bias.normal_(std=3.0, generator=torch.Generator().manual_seed(5))
    sources = torch.tensor([[5, 17, 42, 8, 23, 0], [99, 3, 64, 0, 1, 1]])
    return dense, {"input_ids": sources, "attention_mask": (sources != 1).long()}


def tiny_listener(model_type: str = "whisper", **choices: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A random speech model of 100 tokens, with two inputs."""
    config = AutoConfig.for_model(model_type, **{**SPEECH[model_type], **SPECIAL, **choices}, vocab_size=VOCAB_SIZE)
    dense = _random(AutoModelForSpeechSeq2Seq, config)
    generator = torch.Generator().manual_seed(6)
    shape = (2, 8, 100) if model_type == "whisper" else (2, 100, 8)
    return dense, {"input_features": torch.randn(shape, generator=generator)}


def _random(auto_class: Any, config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    dense = auto_class.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in dense.named_parameters():  # random enough that what is read matters
            if parameter.dim() > 1 and "embed" not in name and "shared" not in name:
                parameter.normal_()
        head, embeddings = dense.get_output_embeddings().weight, dense.get_input_embeddings().weight
        head.normal_(std=0.7)
        if embeddings is not head:  # else the last token says too much of the next one
            embeddings.mul_(0.3)
    return dense


def tiny_model(model_type: str, **choices: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A tiny encoder-decoder by model type."""
    return (tiny_translator if model_type in TEXT else tiny_listener)(model_type, **choices)


def tiny_pairs(file: Path, pairs: int = 60, *, targets: int = 60) -> Path:
    """Write pairs of random words to a .jsonl file, the first ones with a target."""
    generator = torch.Generator().manual_seed(2)
    lines = []
    for number in range(pairs):
        words = [WORDS[word] for word in torch.randint(len(WORDS), (14,), generator=generator).tolist()]
        record = {"source": " ".join(words[:6])} | ({"target": " ".join(words[6:])} if number < targets else {})
        lines.append(json.dumps(record))
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


RATE = 16_000
TIMESTAMPS_FROM = 60  # token ids of the tiny Whisper from which on they are times


def tiny_whisper_checkpoint(folder: Path) -> Path:
    """Save a tiny Whisper with inputs of a second and timestamps, with tokenizer and feature extractor."""
    dense, _ = tiny_listener("whisper")
    generation = dense.generation_config
    generation.no_timestamps_token_id = TIMESTAMPS_FROM - 1
    generation.max_length = 40
    generation._from_model_config = False  # else what only Whisper has is not read back
    generation.max_initial_timestamp_index = 10
    tiny_checkpoint(folder, dense)
    words_of_whisper().save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1, sampling_rate=RATE).save_pretrained(folder)
    return folder


def words_of_whisper() -> WhisperTokenizer:
    """A tokenizer of single characters, with the tiny Whisper's timestamps."""
    characters = {chr(33 + number): 2 + number for number in range(TIMESTAMPS_FROM - 3)}
    times = {f"<|{number / 50:.2f}|>": TIMESTAMPS_FROM + number for number in range(VOCAB_SIZE - TIMESTAMPS_FROM)}
    vocabulary = {"<|endoftext|>": 0, "<pad>": 1, **characters, "<|notimestamps|>": TIMESTAMPS_FROM - 1, **times}
    end = "<|endoftext|>"
    return WhisperTokenizer(vocab=vocabulary, merges=[], unk_token=end, bos_token=end, eos_token=end, pad_token="<pad>")


def sound(seconds: float, seed: int = 0) -> Any:
    """Modulated noise: fp32 [n]."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(int(seconds * RATE), generator=generator) * 0.2
    return (samples * torch.linspace(0, 20, len(samples)).sin()).clamp(-1, 1).numpy()


def tiny_speech(folder: Path, files: int = 30, *, transcripts: int = 0) -> Path:
    """Write recordings of up to a second, the first ones with a transcript."""
    folder.mkdir()
    for number in range(files):
        with wave.open(str(folder / f"{number:03}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes((sound(0.5 + number / 100, number) * 2**15).astype("<i2").tobytes())
        if number < transcripts:
            (folder / f"{number:03}.txt").write_text("CDE")
    return folder
