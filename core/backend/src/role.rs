/// What a weight is for. Together with a layer number it addresses a weight in the index.
///
/// A closed list in this version; plugins see [`Role::id`] and treat an unknown id as unsupported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
#[repr(u8)]
#[allow(
    missing_docs,
    reason = "each variant is the role of that name; shapes stand beside it"
)]
pub enum Role {
    TokenEmbd,      // [vocab, hidden]
    PositionEmbd,   // [positions, hidden]
    OutputNorm,     // [hidden]
    OutputNormBias, // [hidden]
    Output,         // [vocab, hidden]
    OutputBias,     // [vocab]

    AttnNorm,       // [hidden]
    AttnNormBias,   // [hidden]
    AttnQ,          // [n_heads * head_dim, hidden]
    AttnQBias,      // [n_heads * head_dim]
    AttnK,          // [n_kv_heads * head_dim, hidden]
    AttnKBias,      // [n_kv_heads * head_dim]
    AttnV,          // [n_kv_heads * head_dim, hidden]
    AttnVBias,      // [n_kv_heads * head_dim]
    AttnOutput,     // [hidden, n_heads * head_dim]
    AttnOutputBias, // [hidden]
    AttnQNorm,      // [head_dim]
    AttnKNorm,      // [head_dim]
    PostAttnNorm,   // [hidden]

    FfnNorm,     // [hidden]
    FfnNormBias, // [hidden]
    FfnGate,     // [n_ff, hidden]
    FfnGateBias, // [n_ff]
    FfnUp,       // [n_ff, hidden]
    FfnUpBias,   // [n_ff]
    FfnDown,     // [hidden, n_ff]
    FfnDownBias, // [hidden]
    PostFfnNorm, // [hidden]

    Router,      // [n_experts, hidden]
    FfnGateExps, // [n_experts, n_ff_exp, hidden]
    FfnUpExps,   // [n_experts, n_ff_exp, hidden]
    FfnDownExps, // [n_experts, hidden, n_ff_exp]
}

const NAMES: &[(Role, &str)] = &[
    (Role::TokenEmbd, "token_embd"),
    (Role::PositionEmbd, "position_embd"),
    (Role::OutputNorm, "output_norm"),
    (Role::OutputNormBias, "output_norm_bias"),
    (Role::Output, "output"),
    (Role::OutputBias, "output_bias"),
    (Role::AttnNorm, "attn_norm"),
    (Role::AttnNormBias, "attn_norm_bias"),
    (Role::AttnQ, "attn_q"),
    (Role::AttnQBias, "attn_q_bias"),
    (Role::AttnK, "attn_k"),
    (Role::AttnKBias, "attn_k_bias"),
    (Role::AttnV, "attn_v"),
    (Role::AttnVBias, "attn_v_bias"),
    (Role::AttnOutput, "attn_output"),
    (Role::AttnOutputBias, "attn_output_bias"),
    (Role::AttnQNorm, "attn_q_norm"),
    (Role::AttnKNorm, "attn_k_norm"),
    (Role::PostAttnNorm, "post_attn_norm"),
    (Role::FfnNorm, "ffn_norm"),
    (Role::FfnNormBias, "ffn_norm_bias"),
    (Role::FfnGate, "ffn_gate"),
    (Role::FfnGateBias, "ffn_gate_bias"),
    (Role::FfnUp, "ffn_up"),
    (Role::FfnUpBias, "ffn_up_bias"),
    (Role::FfnDown, "ffn_down"),
    (Role::FfnDownBias, "ffn_down_bias"),
    (Role::PostFfnNorm, "post_ffn_norm"),
    (Role::Router, "router"),
    (Role::FfnGateExps, "ffn_gate_exps"),
    (Role::FfnUpExps, "ffn_up_exps"),
    (Role::FfnDownExps, "ffn_down_exps"),
];

impl Role {
    /// Number of roles: [`Role::index`] is below it.
    pub const COUNT: usize = NAMES.len();

    /// Every role, in index order.
    pub fn all() -> impl ExactSizeIterator<Item = Role> + Clone {
        NAMES.iter().map(|(role, _)| *role)
    }

    /// A dense index, for tables.
    pub fn index(self) -> usize {
        self as usize
    }

    /// The number plugins see. Never reused; new roles append.
    pub fn id(self) -> u32 {
        self as u32
    }

    /// The role of that number.
    pub fn from_id(id: u32) -> Option<Self> {
        NAMES.get(usize::try_from(id).ok()?).map(|(role, _)| *role)
    }

    /// The snake-case name used in reports, such as `attn_q`.
    pub fn name(self) -> &'static str {
        NAMES[self.index()].1
    }

    /// The role of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        NAMES.iter().find(|(_, n)| *n == name).map(|(role, _)| *role)
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_are_in_the_order_of_the_enum() {
        for (i, (role, name)) in NAMES.iter().enumerate() {
            assert_eq!(role.index(), i, "{name}");
            assert_eq!(Role::from_id(role.id()), Some(*role));
            assert_eq!(Role::from_name(name), Some(*role));
        }
        assert_eq!(Role::from_id(Role::COUNT as u32), None);
    }
}
