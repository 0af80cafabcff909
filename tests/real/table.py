"""The table of a model: each row has a format string over the raw metrics."""

from typing import Any

ROWS = (
    ("top-1 agreement", "{prose[agreement]:.2%}"),
    ("top-5 recall", "{prose[top5_containment]:.2%}"),
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
    ("identical chat answers", "{chat[identical]} of {chat[answers]}"),
    ("tokens up to the first difference, mean", "{chat[tokens_before_first_difference]:.1f}"),
    ("agreement along its own transcripts", "{speech[agreement_along_output]:.2%}"),
    ("transcripts the same, sparse", "{speech[same_as_dense][sparse]} of {speech[sources]}"),
    ("transcripts the same, lossless", "{speech[same_as_dense][lossless]} of {speech[sources]}"),
    ("word error rate, dense", "{speech[scores][WER][dense]:.2%}"),
    ("word error rate, sparse", "{speech[scores][WER][sparse]:.2%}"),
    ("word error rate, lossless", "{speech[scores][WER][lossless]:.2%}"),
    ("three minutes: segments the same, lossless", "{long[same]} of {long[segments]}"),
    ("bytes read, of the dense head as stored", "{conversion[bytes_read]:.2%}"),
    ("added on disk, bytes", "{conversion[added_bytes]:,}"),
    ("added on disk, of the dense head", "{conversion[added_bytes_share]:.2%}"),
    ("experts", "{conversion[num_experts]:,}"),
    ("k, experts picked per position", "{conversion[num_experts_per_tok]:,}"),
    ("R, exact logits per position", "{conversion[num_rescored]:,}"),
    ("conversion, seconds", "{conversion[seconds]:,.0f}"),
    ("lossless: tokens identical", "{prose[lossless_identical]:,} of {prose[lossless_tokens]:,}"),
    ("lossless: verification passes per token", "{prose[dense_passes_per_token]:.3f}"),
    ("lossless: forward passes per token", "{prose[forward_passes_per_token]:.3f}"),
    ("head, dense, ms", "{speed[head][dense_ms]:.3f}"),
    ("head, dense, with top-p sampling, ms", "{speed[head][dense_sampling_ms]:.3f}"),
    ("head, sparse, ms", "{speed[head][sparse_ms]:.3f}"),
    ("head, sparse, with top-p sampling, ms", "{speed[head][sampling_ms]:.3f}"),
    ("end to end, dense, tokens/s", "{speed[e2e][dense_tok_s]:.1f}"),
    ("end to end, sparse, tokens/s", "{speed[e2e][sparse_tok_s]:.1f}"),
    ("end to end, lossless, tokens/s", "{speed[e2e][lossless_tok_s]:.1f}"),
    ("end to end without a head, tokens/s", "{speed[e2e][no_head_tok_s]:.1f}"),
    ("top-p sampling end to end, dense, tokens/s", "{speed[sampling][dense_tok_s]:.1f}"),
    ("top-p sampling end to end, sparse, tokens/s", "{speed[sampling][sparse_tok_s]:.1f}"),
    ("CPU", "{speed[machine]}"),
    ("threads", "{speed[threads]}"),
    ("dtype measured in", "{speed[dtype]}"),
)
NONE = "-"


def markdown_table(title: str, metrics: dict[str, dict[str, Any]]) -> str:
    """Format the metrics of a model.

    Args:
        title: the model's name.
        metrics: raw metrics by subject, from [`measure`]; rows about a subject that was not measured are left out, and
            one without its metric shows a dash.

    Returns:
        A Markdown table, without a final line break.
    """
    rows = [(name, _value(template, metrics)) for name, template in ROWS if template[1:].split("[")[0] in metrics]
    return "\n".join([f"| | {title} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _value(template: str, metrics: dict[str, dict[str, Any]]) -> str:
    try:
        return template.format_map(metrics)
    except (KeyError, TypeError):  # no such figure, or null
        return NONE
