"""Networks. They know tokens, layouts and conditioning; no modality and no paper."""
