"""The logits processors of Transformers that lossless decoding asks about its guesses as well."""

from transformers.generation import logits_process as processors

# Depend on the prefix and the scores alone, so that they can be asked about guesses. All others, users' own foremost,
# may keep state or run a model: they are shown each prefix that comes to be, once. `TopHLogitsWarper` is left out as
# well: it raises where nothing is left of a draft.
SHARED_PROCESSORS = (
    processors.EncoderNoRepeatNGramLogitsProcessor,
    processors.EncoderRepetitionPenaltyLogitsProcessor,
    processors.EpsilonLogitsWarper,
    processors.EtaLogitsWarper,
    processors.ExponentialDecayLengthPenalty,
    processors.ForcedBOSTokenLogitsProcessor,
    processors.ForcedEOSTokenLogitsProcessor,
    processors.InfNanRemoveLogitsProcessor,
    processors.LogitNormalization,
    processors.MinLengthLogitsProcessor,
    processors.MinNewTokensLengthLogitsProcessor,
    processors.MinPLogitsWarper,
    processors.NoBadWordsLogitsProcessor,
    processors.NoRepeatNGramLogitsProcessor,
    processors.RepetitionPenaltyLogitsProcessor,
    processors.SequenceBiasLogitsProcessor,
    processors.SuppressTokensAtBeginLogitsProcessor,
    processors.SuppressTokensLogitsProcessor,
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
    processors.TypicalLogitsWarper,
    processors.WatermarkLogitsProcessor,
)
