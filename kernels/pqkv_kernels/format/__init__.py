"""What codes are: their layout, tables, packing and rotary embedding. No algorithm; imported by all others."""
