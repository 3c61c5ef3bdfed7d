"""Tiny, offline, randomly initialised diffusers models and pipelines that the tests run on."""
