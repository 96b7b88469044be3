"""Other people's pairs, brought into the format of docs/data_format.md: ``python -m data_pipeline.import_pairs``."""
