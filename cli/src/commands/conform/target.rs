//! The backend under test: built in, or a shared library.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use hoist_conformance::{PluginFacts, Target};
use hoist_core::backend::{self, DeviceInfo, Error, OpenOptions, Provider, WeightBackend};
use hoist_plugin_host::{Candidate, Header, Probe};

use crate::backends::{self, absolute};
use crate::exit::Usage;

/// How long a library that is tried out may take, unless cases have a shorter limit.
pub(super) const PROBE_LIMIT: Duration = Duration::from_secs(30);

/// A target that was found and judged, and is not open in this process.
pub(super) struct Judged {
    name: String,
    what: What,
}

enum What {
    BuiltIn {
        provider: Box<dyn Provider>,
        ordinal: u32,
    },
    Library {
        candidate: Box<Candidate>,
        facts: Box<PluginFacts>,
    },
}

/// Finds a target; a library is judged by its file and tried in a child process.
pub(super) fn judge(name: &str, limit: Duration) -> Result<Judged> {
    let judged = find(name)?;
    if let What::Library { candidate, .. } = &judged.what {
        let probe = Probe::Child {
            program: std::env::current_exe()?,
            arguments: vec!["plugin-probe".into()],
            limit,
        };
        probe.check(candidate)?;
    }
    Ok(judged)
}

/// Opens a target that the parent process has judged; a library must have the same bytes.
pub(super) fn reopen(name: &str, sha256: Option<&str>) -> Result<Opened> {
    let judged = find(name)?;
    if judged.sha256().as_deref() != sha256 {
        return Err(anyhow::anyhow!(
            "`{name}` changed since it was judged: SHA-256 was {sha256:?} and is {:?}",
            judged.sha256()
        ));
    }
    judged.open()
}

fn find(name: &str) -> Result<Judged> {
    let library = name
        .strip_prefix("plugin:")
        .or_else(|| name.contains('/').then_some(name));
    let what = match library {
        Some(path) => find_library(path)?,
        None => find_built_in(name)?,
    };
    Ok(Judged {
        name: name.to_owned(),
        what,
    })
}

fn find_built_in(name: &str) -> Result<What> {
    let backend = name.split_once(':').map_or(name, |(backend, _)| backend);
    let unavailable = |reason: &str, hint: String| Error::Unavailable {
        backend: name.to_owned(),
        reason: reason.to_owned(),
        hint: Some(hint),
    };
    let Some(provider) = backends::all().into_iter().find(|p| p.name() == backend) else {
        let known: Vec<_> = backends::all().iter().map(|p| p.name().to_owned()).collect();
        return Err(unavailable(
            "this program has no such backend",
            format!(
                "it has {}; a library is given by a path with a `/` in it",
                known.join(", ")
            ),
        )
        .into());
    };
    let devices = provider.devices()?;
    let device = devices
        .iter()
        .find(|d| d.id == name || name == backend)
        .ok_or_else(|| {
            let ids: Vec<_> = devices.iter().map(|d| d.id.as_str()).collect();
            unavailable("there is no such device", format!("there is {}", ids.join(", ")))
        })?;
    Ok(What::BuiltIn {
        ordinal: device.ordinal,
        provider,
    })
}

fn find_library(name: &str) -> Result<What> {
    let (path, ordinal) = match name.rsplit_once('#') {
        Some((path, ordinal)) => match ordinal.parse() {
            Ok(ordinal) => (path, ordinal),
            Err(_) => return Err(Usage(format!("`{ordinal}` is no device number")).into()),
        },
        None => (name, 0),
    };
    let candidate = Candidate::open(&absolute(Path::new(path))?)?;
    let header = Header::read(&candidate.path, &candidate.file)?;
    let minor = header.agree(&candidate.path)?;
    let facts = PluginFacts {
        path: candidate.path.clone(),
        sha256: candidate.sha256.clone(),
        name: header.name,
        vendor: header.vendor,
        version: header.version,
        build_id: header.build_id,
        target: header.target,
        abi: (header.abi_major, header.abi_minor_min, header.abi_minor_max),
        minor,
        panic_abort: header.panic_abort,
        spawns_threads: header.spawns_threads,
        exports: header.exports,
        ordinal,
    };
    Ok(What::Library {
        candidate: Box::new(candidate),
        facts: Box::new(facts),
    })
}

impl Judged {
    pub(super) fn sha256(&self) -> Option<String> {
        self.facts().map(|f| f.sha256)
    }

    pub(super) fn facts(&self) -> Option<PluginFacts> {
        match &self.what {
            What::BuiltIn { .. } => None,
            What::Library { facts, .. } => Some((**facts).clone()),
        }
    }

    /// Facts of the device; none of a library, whose code does not run in this process.
    pub(super) fn details(&self) -> Vec<(String, String)> {
        let What::BuiltIn { provider, ordinal } = &self.what else {
            return Vec::new();
        };
        let devices = provider.devices();
        devices
            .ok()
            .and_then(|devices| devices.into_iter().find(|d| d.ordinal == *ordinal))
            .map_or_else(Vec::new, |device| device.details)
    }

    /// Opens it in this process.
    pub(super) fn open(self: &Judged) -> Result<Opened> {
        let (provider, ordinal, plugin): (Box<dyn Provider>, _, _) = match &self.what {
            What::BuiltIn { provider, ordinal } => {
                let name = provider.name().to_owned();
                let provider = backends::all()
                    .into_iter()
                    .find(|p| p.name() == name)
                    .ok_or_else(|| Error::internal(name, "it was there a moment ago"))?;
                (provider, *ordinal, None)
            }
            What::Library { candidate, facts } => {
                let provider = hoist_plugin_host::open(candidate, &Probe::Skip)?;
                (Box::new(provider), facts.ordinal, Some((**facts).clone()))
            }
        };
        Ok(Opened {
            name: self.name.clone(),
            provider,
            ordinal,
            plugin,
        })
    }
}

/// A target whose code is in this process.
pub(super) struct Opened {
    name: String,
    provider: Box<dyn Provider>,
    ordinal: u32,
    plugin: Option<PluginFacts>,
}

impl Target for Opened {
    fn name(&self) -> &str {
        &self.name
    }

    fn devices(&self) -> backend::Result<Vec<DeviceInfo>> {
        self.provider.devices()
    }

    fn open(&self, options: &OpenOptions) -> backend::Result<Box<dyn WeightBackend>> {
        self.provider.open(self.ordinal, options)
    }

    fn open_ordinal(&self, ordinal: u32, options: &OpenOptions) -> backend::Result<Box<dyn WeightBackend>> {
        self.provider.open(ordinal, options)
    }

    fn plugin(&self) -> Option<&PluginFacts> {
        self.plugin.as_ref()
    }
}
