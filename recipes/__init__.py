"""The recipes that come with pqkv: one YAML file per model. Data only."""
