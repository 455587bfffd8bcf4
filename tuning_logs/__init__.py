"""The tuning logs shipped with gf_tvm: one folder per device profile."""
