//! What tests of several packages share: builders of files, the hostile corpus, shared libraries, and a sample of the conformance suite.

pub mod files;
pub mod libraries;
pub mod suite;
