"""Vstar-engine's methods on other libraries' pipelines; no network of this project is imported here."""
