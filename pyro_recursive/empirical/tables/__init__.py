"""Which codes may explain a datum, told from the data alone: kernels, searches, tables q(i | n)."""
