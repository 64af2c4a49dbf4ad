//! Hugging Face hub ids to local folders.
