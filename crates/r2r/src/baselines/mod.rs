//! What routing is held against: other ways of spending a large model's calls.
//!
//! | baseline | where |
//! |---|---|
//! | vanilla speculative decoding (Leviathan et al., 2023) | [`speculative`] |
//! | routing of whole queries: matrix factorisation, a logistic or MLP head, similarity-weighted Bradley-Terry (Ong et al., 2024) | [`query`] |
//! | policies without training | [`crate::policy`] |
//! | a router trained on mismatches instead of divergences, or on fewer inputs | [`crate::training`] with other labels or another [`crate::router::Architecture`] |
//! | a middle-sized model by itself | any checkpoint; [`crate::nano`] has one for each pair |
//! | the path that a judge would take | [`crate::labels::live`] |
//!
//! EAGLE-2 and HASS, which the paper compares with, need draft heads trained for the large model; vanilla drafting stands
//! in for them and is labelled so wherever it is reported.

pub mod query;
pub mod speculative;
