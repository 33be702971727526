"""Shared code of image and video modalities: files in class folders, archives, arrays, captions, class names, Hugging
Face data sets, tar shards and 8-bit rendering. It does not depend on any modality."""
