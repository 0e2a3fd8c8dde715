//! Sampling: what is chosen, how often, and that it is the same each time.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

use hoist_text::{Error, Sampler, SamplerOptions, arg_max};

fn options() -> SamplerOptions {
    SamplerOptions {
        temperature: 1.0,
        ..SamplerOptions::default()
    }
}

/// How often each token comes out over many positions.
fn counts(options: SamplerOptions, logits: &[f32], draws: u64) -> Vec<u64> {
    let mut sampler = Sampler::new(options).unwrap();
    let mut counts = vec![0; logits.len()];
    for position in 0..draws {
        counts[sampler.sample(logits, position).unwrap() as usize] += 1;
    }
    counts
}

/// χ² of counts against probabilities.
fn chi_squared(counts: &[u64], probabilities: &[f64]) -> f64 {
    let total: u64 = counts.iter().sum();
    counts
        .iter()
        .zip(probabilities)
        .map(|(&n, p)| {
            let expected = p * total as f64;
            (n as f64 - expected).powi(2) / expected
        })
        .sum()
}

fn softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
    let weights: Vec<f64> = logits
        .iter()
        .map(|&l| (f64::from(l) / temperature).exp())
        .collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

const LOGITS: [f32; 8] = [0.5, 2.0, -1.0, 1.5, 2.0, 0.0, -0.5, 1.0];

#[test]
fn draws_follow_the_softmax_at_each_temperature() {
    for (seed, temperature) in [(1, 0.5), (2, 1.0), (3, 2.0)] {
        let sampled = counts(
            SamplerOptions {
                temperature,
                seed,
                ..options()
            },
            &LOGITS,
            100_000,
        );
        // With 7 degrees of freedom χ² exceeds 24.3 once in a thousand seeds; these seeds are fixed.
        let chi = chi_squared(&sampled, &softmax(&LOGITS, temperature));
        assert!(chi < 24.3, "{temperature}: {chi}");
        // The test can fail: the same counts do not fit another temperature.
        assert!(chi_squared(&sampled, &softmax(&LOGITS, temperature * 1.1)) > 100.0);
    }
}

#[test]
fn truncations_keep_exactly_the_likeliest_tokens() {
    let support = |o: SamplerOptions| -> Vec<usize> {
        let counts = counts(o, &LOGITS, 20_000);
        (0..LOGITS.len()).filter(|&t| counts[t] > 0).collect()
    };
    assert_eq!(support(options()).len(), 8);
    // Of the two equal greatest, the lower id is the one kept.
    assert_eq!(
        support(SamplerOptions {
            top_k: 1,
            ..options()
        }),
        [1]
    );
    assert_eq!(
        support(SamplerOptions {
            top_k: 3,
            ..options()
        }),
        [1, 3, 4]
    );
    assert_eq!(
        support(SamplerOptions {
            top_k: 99,
            ..options()
        })
        .len(),
        8
    );
    // Probabilities in order: 0.289 0.289 0.175 0.106 0.064 …
    assert_eq!(
        support(SamplerOptions {
            top_p: 0.28,
            ..options()
        }),
        [1]
    );
    assert_eq!(
        support(SamplerOptions {
            top_p: 0.57,
            ..options()
        }),
        [1, 4]
    );
    assert_eq!(
        support(SamplerOptions {
            top_p: 0.58,
            ..options()
        }),
        [1, 3, 4]
    );
    // 1.5 is e^-0.5 = 0.607 as likely as the greatest, 1.0 is 0.368.
    assert_eq!(
        support(SamplerOptions {
            min_p: 0.6,
            ..options()
        }),
        [1, 3, 4]
    );
    assert_eq!(
        support(SamplerOptions {
            min_p: 0.61,
            ..options()
        }),
        [1, 4]
    );
    // Top-p counts within what top-k has left: of two, half the mass is one.
    let both = SamplerOptions {
        top_k: 2,
        top_p: 0.5,
        ..options()
    };
    assert_eq!(support(both), [1]);
}

#[test]
fn top_p_sorts_as_far_as_it_needs_in_large_vocabularies() {
    // 5,000 tokens of nearly equal logits, shuffled: the mass of top-p 0.5 is spread over the greater half.
    let logits: Vec<f32> = (0..5000u32).map(|i| (i * 1237 % 5000) as f32 * 1e-6).collect();
    let o = SamplerOptions {
        top_p: 0.5,
        ..options()
    };
    let mut sampler = Sampler::new(o).unwrap();
    for position in 0..3000 {
        let token = sampler.sample(&logits, position).unwrap();
        assert!(logits[token as usize] >= 2490.0 * 1e-6, "{token}");
    }
}

#[test]
fn a_position_has_the_same_token_whatever_came_before() {
    let o = SamplerOptions {
        seed: 42,
        ..options()
    };
    let mut forwards = Sampler::new(o.clone()).unwrap();
    let tokens: Vec<u32> = (0..50).map(|p| forwards.sample(&LOGITS, p).unwrap()).collect();
    let mut backwards = Sampler::new(o).unwrap();
    backwards.sample(&[0.0; 100], 7).unwrap();
    for position in (0..50).rev() {
        assert_eq!(
            backwards.sample(&LOGITS, position).unwrap(),
            tokens[position as usize]
        );
    }
    // A golden, so that no change of the arithmetic goes unnoticed.
    assert_eq!(tokens[..16], GOLDEN);
    let mut other = Sampler::new(SamplerOptions {
        seed: 43,
        ..options()
    })
    .unwrap();
    let others: Vec<u32> = (0..50).map(|p| other.sample(&LOGITS, p).unwrap()).collect();
    assert_ne!(others, tokens);
}

const GOLDEN: [u32; 16] = [4, 7, 4, 4, 1, 1, 1, 2, 4, 1, 3, 1, 3, 1, 1, 4];

#[test]
fn temperature_zero_is_the_first_greatest() {
    let mut greedy = Sampler::new(SamplerOptions::default()).unwrap();
    for position in 0..10 {
        assert_eq!(greedy.sample(&LOGITS, position).unwrap(), 1);
    }
    assert_eq!(arg_max(&[-0.0, 0.0]).unwrap(), 0);
    // However low a temperature is, it does not overflow.
    let mut cold = Sampler::new(SamplerOptions {
        temperature: 1e-300,
        top_k: 1,
        ..options()
    })
    .unwrap();
    assert_eq!(cold.sample(&LOGITS, 0).unwrap(), 1);
}

#[test]
fn repeated_tokens_are_penalised_once_and_only_within_the_window() {
    let o = SamplerOptions {
        repetition_penalty: 1.5,
        repetition_window: 2,
        ..SamplerOptions::default()
    };
    let mut sampler = Sampler::new(o).unwrap();
    assert_eq!(sampler.sample(&LOGITS, 0).unwrap(), 1);
    sampler.accept(1);
    assert_eq!(sampler.sample(&LOGITS, 1).unwrap(), 4);
    // 2.0 / 1.5 = 1.33 is less than 1.5; penalised twice it would still be.
    sampler.accept(4);
    assert_eq!(sampler.sample(&LOGITS, 2).unwrap(), 3);
    // 1 leaves the window.
    sampler.accept(3);
    assert_eq!(sampler.sample(&LOGITS, 3).unwrap(), 1);
    // 3 twice: 1.8 / 1.5 = 1.2 stays ahead of 1.1; twice penalised, 0.8, it would not.
    sampler.accept(3);
    let logits = [1.1, 0.0, 0.0, 1.8];
    assert_eq!(sampler.sample(&logits, 4).unwrap(), 3);
    // Negative logits sink, tokens outside the vocabulary do not matter.
    sampler.accept(0);
    sampler.accept(1000);
    assert_eq!(sampler.sample(&[-1.0, -1.2], 5).unwrap(), 1);
    sampler.reset();
    assert_eq!(sampler.sample(&[-1.0, -1.2], 6).unwrap(), 0);
}

#[test]
fn logits_that_are_no_numbers_are_refused() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for temperature in [0.0, 1.0] {
            let mut sampler = Sampler::new(SamplerOptions {
                temperature,
                ..options()
            })
            .unwrap();
            let error = sampler.sample(&[1.0, bad], 0).unwrap_err();
            assert!(matches!(error, Error::NonFiniteLogit { token: 1, .. }), "{error}");
            assert!(matches!(sampler.sample(&[], 0), Err(Error::LogitCount { .. })));
            assert!(sampler.sample(&[1.0, f32::MAX], 0).is_ok());
        }
    }
}

#[test]
fn options_out_of_range_are_refused_by_name() {
    let bad = [
        (
            "temperature",
            SamplerOptions {
                temperature: -0.1,
                ..options()
            },
        ),
        (
            "temperature",
            SamplerOptions {
                temperature: f64::NAN,
                ..options()
            },
        ),
        (
            "top_p",
            SamplerOptions {
                top_p: 0.0,
                ..options()
            },
        ),
        (
            "top_p",
            SamplerOptions {
                top_p: 1.1,
                ..options()
            },
        ),
        (
            "min_p",
            SamplerOptions {
                min_p: f64::NAN,
                ..options()
            },
        ),
        (
            "repetition_penalty",
            SamplerOptions {
                repetition_penalty: 0.0,
                ..options()
            },
        ),
        (
            "repetition_window",
            SamplerOptions {
                repetition_window: usize::MAX,
                ..options()
            },
        ),
    ];
    for (name, o) in bad {
        let message = Sampler::new(o).unwrap_err().to_string();
        assert!(message.starts_with(name), "{message}");
    }
}
