"""The steps, one file and one class each. ``data_pipeline.build`` has them in their order."""
