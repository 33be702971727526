"""Networks over tokens, layouts and conditioning, independent of modalities and papers."""
