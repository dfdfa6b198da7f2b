"""Tests of the features command."""
