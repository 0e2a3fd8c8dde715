//! The backends that this program was built with.

use hoist_core::backend::{DeviceInfo, Error, OpenOptions, Provider, WeightBackend};

/// Every backend, in the order that `hoist devices` lists them.
pub(crate) fn all() -> Vec<Box<dyn Provider>> {
    vec![Box::new(hoist_cpu::CpuProvider)]
}

/// A backend and one of its devices.
pub(crate) struct Selected {
    provider: Box<dyn Provider>,
    ordinal: u32,
}

/// Finds a backend by name (`cuda`: its first device) or a device by id (`cuda:1`).
pub(crate) fn select(name: &str) -> Result<Selected, Error> {
    let backend = name.split_once(':').map_or(name, |(backend, _)| backend);
    let unavailable = |reason: String, hint: String| Error::Unavailable {
        backend: name.to_owned(),
        reason,
        hint: Some(hint),
    };
    let Some(provider) = all().into_iter().find(|p| p.name() == backend) else {
        let known: Vec<_> = all().iter().map(|p| p.name().to_owned()).collect();
        return Err(unavailable(
            "this program has no such backend".into(),
            format!("it has {}", known.join(", ")),
        ));
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
        ));
    };
    Ok(Selected {
        ordinal: device.ordinal,
        provider,
    })
}

impl Selected {
    /// Opens the device.
    pub(crate) fn open(&self, options: &OpenOptions) -> Result<Box<dyn WeightBackend>, Error> {
        self.provider.open(self.ordinal, options)
    }
}

/// What each backend says of this machine.
pub(crate) fn devices() -> Vec<(String, Result<Vec<DeviceInfo>, Error>)> {
    all()
        .iter()
        .map(|provider| (provider.name().to_owned(), provider.devices()))
        .collect()
}
