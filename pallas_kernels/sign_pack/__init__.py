"""One-bit compression with error feedback: sign_pack, unpack_average, unpack (api.py says what they compute)."""
