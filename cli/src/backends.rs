//! The backends that this program was built with.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use hoist_core::backend::{
    BackendInfo, Capacity, DecodeProgram, DeviceInfo, Error, LoadPlan, MemoryInfo, OpenOptions, Outline,
    Provider, WeightBackend,
};
use hoist_core::model::ResolvedModel;
use hoist_core::orchestrator::{PlanError, plan_for, plan_outlined};
use hoist_plugin_host::{Candidate, Isolation, Lockfile, Probe};

use crate::args::DeviceArgs;

/// Every backend, in the order that `hoist devices` lists them.
pub(crate) fn all() -> Vec<Box<dyn Provider>> {
    vec![
        Box::new(hoist_cpu::CpuProvider),
        Box::new(hoist_cuda::CudaProvider),
        Box::new(hoist_wgpu::WgpuProvider),
    ]
}

/// A backend and one of its devices.
pub(crate) struct Selected {
    provider: Box<dyn Provider>,
    ordinal: u32,
}

/// Finds a backend by name (`cuda`: its first device), a device by id (`cuda:1`), or a plugin (`plugin:PATH`,
/// `plugin:NAME` of the lockfile; `#1` behind either: its second device).
pub(crate) fn select(device: &DeviceArgs) -> Result<Selected> {
    let name = device.backend.as_str();
    if let Some(plugin) = name.strip_prefix("plugin:") {
        let limit = Duration::from_secs(device.isolate_limit);
        let probe_limit = device.probe_limit.map(Duration::from_secs);
        return select_plugin(plugin, device.isolate.then_some(limit), probe_limit);
    }
    let backend = name.split_once(':').map_or(name, |(backend, _)| backend);
    if device.isolate {
        return Err(crate::exit::Usage("--isolate is for plugins".into()).into());
    }
    if device.probe_limit.is_some() {
        return Err(crate::exit::Usage("--probe-limit is for plugins given by path".into()).into());
    }
    let unavailable = |reason: String, hint: String| Error::Unavailable {
        backend: name.to_owned(),
        reason,
        hint: Some(hint),
    };
    let Some(provider) = all().into_iter().find(|p| p.name() == backend) else {
        let known: Vec<_> = all().iter().map(|p| p.name().to_owned()).collect();
        return Err(unavailable(
            "this program has no such backend".into(),
            format!(
                "it has {}; plugin:PATH is one in a shared library",
                known.join(", ")
            ),
        )
        .into());
    };
    if name == backend {
        return Ok(Selected { provider, ordinal: 0 });
    }
    let devices = provider.devices()?;
    let Some(device) = devices.iter().find(|d| d.id == name) else {
        let ids: Vec<_> = devices.iter().map(|d| d.id.as_str()).collect();
        return Err(unavailable(
            "there is no such device".into(),
            format!("there is {}", ids.join(", ")),
        )
        .into());
    };
    Ok(Selected {
        ordinal: device.ordinal,
        provider,
    })
}

impl Selected {
    /// The device's number.
    pub(crate) fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// Opens the device.
    pub(crate) fn open(&self, options: &OpenOptions) -> Result<Box<dyn WeightBackend>, Error> {
        self.provider.open(self.ordinal, options)
    }
}

/// What a plan is made for.
pub(crate) enum Planned {
    /// A device.
    Open(Box<dyn WeightBackend>),
    /// One that is not here, for that reason, of which the user has said how much memory it has.
    Assumed(Box<Outline>, Error),
}

/// Opens a device to plan for. Where there is none, a backend may know enough without it.
pub(crate) fn planned_for(device: &DeviceArgs) -> Result<Planned> {
    let options = device.open_options();
    let opened = select(device).and_then(|selected| Ok(selected.open(&options)?));
    let missing = match opened {
        Ok(backend) => return Ok(Planned::Open(backend)),
        Err(error) => error.downcast::<Error>()?,
    };
    let Error::Unavailable {
        backend,
        reason,
        hint,
    } = missing
    else {
        return Err(missing.into());
    };
    let name = device.backend.split(':').next().unwrap_or_default();
    let outline = match all().iter().find(|p| p.name() == name) {
        Some(provider) => provider.outline(&options)?,
        None => None,
    };
    let more = match (outline, device.memory) {
        (Some(outline), Some(_)) => {
            let missing = Error::Unavailable {
                backend,
                reason,
                hint,
            };
            return Ok(Planned::Assumed(Box::new(outline), missing));
        }
        (Some(_), None) => Some("with --memory, a device that has so much is planned for without it"),
        (None, Some(_)) => {
            Some("what this backend can hold depends on its device, so that there is no plan without it")
        }
        (None, None) => None,
    };
    let hints: Vec<&str> = hint.as_deref().into_iter().chain(more).collect();
    Err(Error::Unavailable {
        backend,
        reason,
        hint: (!hints.is_empty()).then(|| hints.join("; ")),
    }
    .into())
}

impl Planned {
    pub(crate) fn info(&self) -> &BackendInfo {
        match self {
            Planned::Open(backend) => backend.info(),
            Planned::Assumed(outline, _) => &outline.info,
        }
    }

    /// Memory now, or as it is assumed.
    pub(crate) fn memory(&self) -> Result<MemoryInfo, Error> {
        match self {
            Planned::Open(backend) => backend.memory(),
            Planned::Assumed(outline, _) => Ok(outline.info.memory.clone()),
        }
    }

    pub(crate) fn plan(
        &self,
        model: &ResolvedModel,
        decode: Option<(&DecodeProgram, Capacity)>,
    ) -> Result<LoadPlan, PlanError> {
        match self {
            Planned::Open(backend) => plan_for(backend.as_ref(), model, decode),
            Planned::Assumed(outline, _) => plan_outlined(outline, model, decode),
        }
    }

    /// Why there is no device, if one is assumed.
    pub(crate) fn assumed(&self) -> Option<&Error> {
        match self {
            Planned::Open(_) => None,
            Planned::Assumed(_, missing) => Some(missing),
        }
    }
}

/// What each backend says of this machine.
pub(crate) fn devices() -> Vec<(String, Result<Vec<DeviceInfo>, Error>)> {
    all()
        .iter()
        .map(|provider| (provider.name().to_owned(), provider.devices()))
        .collect()
}

/// How long a library that is tried out may take, unless the user says otherwise.
pub(crate) const PROBE_LIMIT: Duration = Duration::from_secs(30);

/// `isolate`: in a process of its own, where a call may take that long.
fn select_plugin(name: &str, isolate: Option<Duration>, probe_limit: Option<Duration>) -> Result<Selected> {
    let (place, ordinal) = match name.rsplit_once('#') {
        Some((place, ordinal)) => match ordinal.parse() {
            Ok(ordinal) => (place, ordinal),
            Err(_) => return Err(crate::exit::Usage(format!("`{ordinal}` is no device number")).into()),
        },
        None => (name, 0),
    };
    // What the lockfile names was probed when it was trusted, and has the same bytes.
    let (candidate, probe) = if place.contains('/') {
        (
            Candidate::open(&absolute(Path::new(place))?)?,
            probe(probe_limit.unwrap_or(PROBE_LIMIT))?,
        )
    } else if probe_limit.is_some() {
        return Err(crate::exit::Usage("--probe-limit is for plugins given by path".into()).into());
    } else {
        let lockfile = lockfile()?;
        let candidate = Lockfile::read(&lockfile)?.open(place, &lockfile)?;
        (candidate, Probe::Skip)
    };
    let provider = match isolate {
        Some(limit) => hoist_plugin_host::open_isolated(
            &candidate,
            &Isolation {
                program: std::env::current_exe()?,
                arguments: vec!["plugin-worker".into()],
                limit,
            },
        )?,
        None => hoist_plugin_host::open(&candidate, &probe)?,
    };
    Ok(Selected {
        provider: Box::new(provider),
        ordinal,
    })
}

/// How an unknown library is tried out: by this program, in a child process.
pub(crate) fn probe(limit: Duration) -> Result<Probe> {
    Ok(Probe::Child {
        program: std::env::current_exe()?,
        arguments: vec!["plugin-probe".into()],
        limit,
    })
}

/// Where trusted plugins are listed: `hoist/plugins.lock.json` in the user's folder of settings.
pub(crate) fn lockfile() -> Result<PathBuf> {
    let folder = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|p| p.is_absolute())
    };
    let settings = folder("XDG_CONFIG_HOME").or_else(|| folder("HOME").map(|home| home.join(".config")));
    match settings {
        Some(settings) => Ok(settings.join("hoist").join("plugins.lock.json")),
        None => {
            Err(crate::exit::Usage("neither XDG_CONFIG_HOME nor HOME says where settings are".into()).into())
        }
    }
}

/// A path the user typed, from the folder they typed it in.
pub(crate) fn absolute(path: &Path) -> std::io::Result<PathBuf> {
    std::path::absolute(path)
}
