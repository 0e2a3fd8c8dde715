//! Where the time of a step goes, layers taken together.

use hoist_core::backend::PhaseTime;
use serde_json::{Value, json};

use super::table::{self, Align};
use super::units;

/// A kind of phase over all layers.
struct Kind {
    name: String,
    /// Phases of a step.
    count: usize,
    /// Microseconds of a step: the median over steps.
    micros: f64,
    /// Bytes of weights of a step.
    bytes: u64,
}

/// The phases of a step, those of one name together, in the order in which they come first.
pub(crate) struct Profile {
    kinds: Vec<Kind>,
}

impl Profile {
    pub(crate) fn of(steps: &[Vec<PhaseTime>]) -> Self {
        let mut names: Vec<&str> = Vec::new();
        for phase in steps.iter().flatten() {
            if !names.contains(&phase.name.as_str()) {
                names.push(&phase.name);
            }
        }
        let kinds = names
            .into_iter()
            .map(|name| {
                let of_step = |phases: &[PhaseTime]| {
                    let mine = phases.iter().filter(|p| p.name == name);
                    mine.fold((0, 0.0, 0), |(count, micros, bytes), p| {
                        (
                            count + 1,
                            micros + p.time.as_secs_f64() * 1e6,
                            bytes + p.weight_bytes,
                        )
                    })
                };
                let all: Vec<(usize, f64, u64)> = steps.iter().map(|s| of_step(s)).collect();
                let mut micros: Vec<f64> = all.iter().map(|(_, micros, _)| *micros).collect();
                micros.sort_by(f64::total_cmp);
                Kind {
                    name: name.to_owned(),
                    count: all.iter().map(|(count, _, _)| *count).max().unwrap_or(0),
                    micros: micros.get(micros.len() / 2).copied().unwrap_or(0.0),
                    bytes: all.iter().map(|(_, _, bytes)| *bytes).max().unwrap_or(0),
                }
            })
            .collect();
        Self { kinds }
    }

    /// `bandwidth` is what memory gives, in 10^9 bytes a second.
    pub(crate) fn json(&self, bandwidth: f64) -> Value {
        self.kinds
            .iter()
            .map(|k| {
                let rate = k.rate();
                json!({
                    "phase": k.name,
                    "count": k.count,
                    "micros": units::rounded(k.micros, 3),
                    "weight_bytes": k.bytes,
                    "gb_s": rate.map(|r| units::rounded(r, 3)),
                    "bandwidth_share": rate.map(|r| units::rounded(r / bandwidth, 4)),
                })
            })
            .collect()
    }

    /// As [`Profile::json`], to be read.
    pub(crate) fn table(&self, bandwidth: f64) -> String {
        let total: f64 = self.kinds.iter().map(|k| k.micros).sum();
        let rows = self.kinds.iter().map(|k| {
            let rate = k.rate();
            vec![
                k.name.clone(),
                k.count.to_string(),
                format!("{:.1}", k.micros),
                format!("{:.1} %", 100.0 * k.micros / total.max(1e-9)),
                if k.bytes == 0 {
                    String::new()
                } else {
                    units::bytes(k.bytes)
                },
                rate.map_or_else(String::new, |r| format!("{r:.1}")),
                rate.map_or_else(String::new, |r| format!("{:.0} %", 100.0 * r / bandwidth)),
            ]
        });
        let last = vec![
            "step".into(),
            String::new(),
            format!("{total:.1}"),
            "100.0 %".into(),
            units::bytes(self.kinds.iter().map(|k| k.bytes).sum()),
            String::new(),
            String::new(),
        ];
        table::render(
            &[
                ("phase", Align::Left),
                ("times", Align::Right),
                ("µs a step", Align::Right),
                ("share", Align::Right),
                ("weights", Align::Right),
                ("GB/s", Align::Right),
                ("of memory", Align::Right),
            ],
            rows.chain([last]),
        )
    }
}

impl Kind {
    /// In 10^9 bytes a second; `None` of what reads no weights.
    fn rate(&self) -> Option<f64> {
        (self.bytes > 0 && self.micros > 0.0).then(|| self.bytes as f64 / self.micros / 1e3)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn layers_are_taken_together_and_steps_by_their_median() {
        let phase = |name: &str, layer, micros, weight_bytes| PhaseTime {
            name: name.into(),
            layer,
            time: Duration::from_micros(micros),
            weight_bytes,
        };
        let step = |micros| {
            vec![
                phase("matmul", Some(0), micros, 1000),
                phase("attention", Some(0), 5, 0),
                phase("matmul", Some(1), micros, 3000),
            ]
        };
        let profile = Profile::of(&[step(4), step(90), step(6)]);
        assert_eq!(profile.kinds.len(), 2);
        let matmul = &profile.kinds[0];
        assert_eq!(
            (matmul.name.as_str(), matmul.count, matmul.bytes),
            ("matmul", 2, 4000)
        );
        assert!((matmul.micros - 12.0).abs() < 1e-9);
        let json = profile.json(1.0);
        assert_eq!(json[0]["gb_s"], json!(0.333));
        assert_eq!(json[1]["gb_s"], Value::Null);
        let table = profile.table(1.0);
        assert!(table.contains("33 %") && table.contains("17.0"), "{table}");
    }
}
