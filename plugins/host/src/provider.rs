use std::sync::Arc;

use hoist_backend::{DeviceInfo, Error as BackendError, OpenOptions, Provider, WeightBackend};
use hoist_plugin_abi as abi;

use crate::backend::PluginBackend;
use crate::header::{Header, text};
use crate::isolate::Isolation;
use crate::library::Loaded;
use crate::policy::Candidate;
use crate::probe::Probe;
use crate::{Error, Result};

/// A plugin in this process, as a kind of backend.
pub struct PluginProvider {
    loaded: Arc<Loaded>,
    /// `plugin:` and the name in its header.
    name: String,
}

/// More devices than this are taken for a lie.
const MAX_DEVICES: u32 = 1024;

/// Judges, probes and loads a plugin.
///
/// # Errors
/// The rules of [`Header::read`] and [`Header::agree`]; [`Error::Probe`]; [`Error::Load`], [`Error::Open`],
/// [`Error::BadTable`], [`Error::Changed`].
pub fn open(candidate: &Candidate, probe: &Probe) -> Result<PluginProvider> {
    let header = Header::read(&candidate.path, &candidate.file)?;
    let minor = header.agree(&candidate.path)?;
    probe.check(candidate)?;
    let name = format!("plugin:{}", header.name);
    Ok(PluginProvider {
        loaded: Loaded::open(candidate, header, minor)?,
        name,
    })
}

/// Judges a plugin and loads it in a process of its own, which its crashes and hangs do not leave. No probe is needed.
///
/// # Errors
/// The rules of [`Header::read`] and [`Header::agree`]; [`Error::Worker`], with what [`open`] would return there.
pub fn open_isolated(candidate: &Candidate, isolation: &Isolation) -> Result<PluginProvider> {
    let header = Header::read(&candidate.path, &candidate.file)?;
    let minor = header.agree(&candidate.path)?;
    let name = format!("plugin:{}", header.name);
    Ok(PluginProvider {
        loaded: Loaded::isolate(candidate, header, minor, isolation)?,
        name,
    })
}

impl PluginProvider {
    /// What the plugin says of itself.
    pub fn header(&self) -> &Header {
        &self.loaded.header
    }

    /// The minor both sides speak.
    pub fn minor(&self) -> u32 {
        self.loaded.minor
    }

    /// SHA-256 of the library, in lower-case hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.loaded.sha256
    }

    fn device(&self, ordinal: u32) -> hoist_backend::Result<DeviceInfo> {
        let mut info = abi::DeviceInfo {
            struct_size: size_of::<abi::DeviceInfo>() as u32,
            ordinal,
            id: [0; 32],
            name: [0; 128],
            total_memory: 0,
        };
        let f = self
            .loaded
            .table
            .device_info
            .ok_or_else(|| self.internal("`device_info` is NULL"))?;
        self.loaded
            // SAFETY: `info` and the record are valid for the call.
            .call(|record| unsafe { f(ordinal, &mut info, record) })
            .map_err(|failure| self.internal(format!("`device_info`: {}", failure.explain())))?;
        let string = |field: &[u8], what| {
            text(field).ok_or_else(|| {
                self.internal(format!(
                    "the {what} of device {ordinal} is no UTF-8 ended by a NUL"
                ))
            })
        };
        Ok(DeviceInfo {
            ordinal,
            id: string(&info.id, "id")?,
            name: string(&info.name, "name")?,
            total_memory: info.total_memory,
            details: vec![
                ("library".into(), self.loaded.path.display().to_string()),
                ("vendor".into(), self.loaded.header.vendor.clone()),
                ("version".into(), self.loaded.header.version.clone()),
            ],
        })
    }

    fn internal(&self, what: impl std::fmt::Display) -> BackendError {
        BackendError::internal(&self.name, what)
    }
}

impl Provider for PluginProvider {
    fn name(&self) -> &str {
        &self.name
    }

    fn devices(&self) -> hoist_backend::Result<Vec<DeviceInfo>> {
        let mut count = 0;
        let f = self
            .loaded
            .table
            .device_count
            .ok_or_else(|| self.internal("`device_count` is NULL"))?;
        self.loaded
            // SAFETY: `count` and the record are valid for the call.
            .call(|record| unsafe { f(&mut count, record) })
            .map_err(|failure| BackendError::Unavailable {
                backend: self.name.clone(),
                reason: format!("`device_count`: {}", failure.explain()),
                hint: None,
            })?;
        if count > MAX_DEVICES {
            return Err(self.internal(format!("it claims {count} devices, more than {MAX_DEVICES}")));
        }
        if count == 0 {
            return Err(BackendError::Unavailable {
                backend: self.name.clone(),
                reason: "it found no device on this machine".into(),
                hint: None,
            });
        }
        (0..count).map(|ordinal| self.device(ordinal)).collect()
    }

    fn open(&self, ordinal: u32, options: &OpenOptions) -> hoist_backend::Result<Box<dyn WeightBackend>> {
        let devices = self.devices()?;
        let device = devices
            .get(ordinal as usize)
            .ok_or_else(|| BackendError::Unavailable {
                backend: self.name.clone(),
                reason: format!("it has no device {ordinal}"),
                hint: Some(format!("its devices are 0 to {}", devices.len() - 1)),
            })?;
        Ok(Box::new(PluginBackend::open(
            self.loaded.clone(),
            &self.name,
            device,
            options,
        )?))
    }
}

/// What a probe in a child process does: load, open, count devices, shut down.
///
/// # Errors
/// As [`open`], and what the plugin says of its devices as [`Error::Open`].
pub fn probe_here(candidate: &Candidate) -> Result<u32> {
    let provider = open(candidate, &Probe::Skip)?;
    match provider.devices() {
        Ok(devices) => Ok(devices.len() as u32),
        Err(BackendError::Unavailable { .. }) => Ok(0),
        Err(e) => Err(Error::Open {
            path: candidate.path.clone(),
            reason: e.to_string(),
        }),
    }
}
