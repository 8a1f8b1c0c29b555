"""Every operation in plain fp32 torch: the meaning of all faster ones. Imports `format` alone."""
