//! A program ready to run.

use std::ops::Deref;

use hoist_backend::{DecodeProgram, ResolvedProgram, Result, Table, WeightFacts, WeightIndex, WorkspaceDims};

use crate::residency::Residency;

/// A program whose operands are looked up, with its tables.
#[derive(Debug)]
pub(crate) struct Compiled {
    resolved: ResolvedProgram,
    pub(crate) tables: Vec<Table>,
}

impl Deref for Compiled {
    type Target = ResolvedProgram;

    fn deref(&self) -> &ResolvedProgram {
        &self.resolved
    }
}

/// Resolves and checks a program.
pub(crate) fn compile(
    program: &DecodeProgram,
    dims: &WorkspaceDims,
    index: &WeightIndex,
    residency: &Residency,
) -> Result<Compiled> {
    let resolved = ResolvedProgram::new(crate::NAME, program, dims, index, |id| {
        let weight = residency.weight(id)?;
        Ok(WeightFacts {
            name: &weight.name,
            class: weight.class,
            encoding: weight.encoding,
            shape: weight.shape,
            layout: weight.layout,
        })
    })?;
    Ok(Compiled {
        resolved,
        tables: program.tables.clone(),
    })
}
