"""The table of a model: a row is one line here, whose value is a format string over the raw figures."""

from typing import Any

ROWS = (
    ("agreement", "{prose[agreement]:.2%}"),
    ("top-5", "{prose[top5_containment]:.2%}"),
    ("perplexity, dense", "{prose[perplexity_dense]:.2f}"),
    ("perplexity, sparse", "{prose[perplexity_sparse]:.2f}"),
    ("perplexity over dense", "{prose[perplexity_over_dense]:+.2%}"),
    ("KL, nats", "{prose[kl]:.4f}"),
    ("positions measured", "{prose[positions]:,}"),
    ("agreement on code", "{code[agreement]:.2%}"),
    ("agreement on French", "{french[agreement]:.2%}"),
    ("agreement on German", "{german[agreement]:.2%}"),
    ("perplexity over dense: code", "{code[perplexity_over_dense]:+.2%}"),
    ("perplexity over dense: French", "{french[perplexity_over_dense]:+.2%}"),
    ("perplexity over dense: German", "{german[perplexity_over_dense]:+.2%}"),
    ("agreement along its own chat answers", "{chat[agreement]:.2%} of {chat[tokens]:,} tokens"),
    ("chat answers the same to the end", "{chat[identical]} of {chat[answers]}"),
    ("tokens up to the first difference, mean", "{chat[tokens_before_first_difference]:.1f}"),
    ("bytes read, of the dense head as stored", "{conversion[bytes_read]:.2%}"),
    ("added on disk, bytes", "{conversion[added_bytes]:,}"),
    ("added on disk, of the dense head", "{conversion[added_bytes_share]:.2%}"),
    ("experts", "{conversion[num_experts]:,}"),
    ("k, experts picked for a position", "{conversion[num_experts_per_tok]:,}"),
    ("R, exact logits of their tokens", "{conversion[num_rescored]:,}"),
    ("conversion, seconds", "{conversion[seconds]:,.0f}"),
    ("lossless: tokens identical", "{prose[lossless_identical]:,} of {prose[lossless_tokens]:,}"),
    ("lossless: dense passes a token", "{prose[dense_passes_per_token]:.3f}"),
    ("lossless: body steps a token", "{prose[forward_passes_per_token]:.3f}"),
    ("head, dense, ms", "{speed[head][dense_ms]:.3f}"),
    ("head, sparse, ms", "{speed[head][sparse_ms]:.3f}"),
    ("head, sparse, with top-p sampling, ms", "{speed[head][sampling_ms]:.3f}"),
    ("end to end, dense, tokens/s", "{speed[e2e][dense_tok_s]:.1f}"),
    ("end to end, sparse, tokens/s", "{speed[e2e][sparse_tok_s]:.1f}"),
    ("end to end, lossless, tokens/s", "{speed[e2e][lossless_tok_s]:.1f}"),
    ("end to end without a head, tokens/s", "{speed[e2e][no_head_tok_s]:.1f}"),
    ("top-p sampling end to end, dense, tokens/s", "{speed[sampling][dense_tok_s]:.1f}"),
    ("top-p sampling end to end, sparse, tokens/s", "{speed[sampling][sparse_tok_s]:.1f}"),
    ("processor", "{speed[machine]}"),
    ("threads", "{speed[threads]}"),
    ("type measured in", "{speed[dtype]}"),
)
NONE = "-"


def markdown_table(title: str, figures: dict[str, dict[str, Any]]) -> str:
    """Print the figures of a model.

    Args:
        title: the model's name.
        figures: raw figures by what they are of, as [`measure`] returns them; a row whose figures a model does not have
            shows a dash.

    Returns:
        A Markdown table, without a line break at its end.
    """
    rows = [(name, _value(template, figures)) for name, template in ROWS]
    return "\n".join([f"| | {title} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _value(template: str, figures: dict[str, dict[str, Any]]) -> str:
    try:
        return template.format_map(figures)
    except (KeyError, TypeError):  # no such figure, or null
        return NONE
