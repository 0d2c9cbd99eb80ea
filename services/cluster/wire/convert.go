package wire

import (
	"net/netip"
	"time"

	"krgimage/services/cluster"
)

var states = map[cluster.State]State{
	cluster.Possible: State_STATE_POSSIBLE, cluster.Present: State_STATE_PRESENT, cluster.Online: State_STATE_ONLINE,
}

// FromMember is a member on the wire.
func FromMember(m cluster.Member) *Member {
	w := &Member{
		Id: int32(m.ID), State: states[m.State], Epoch: m.Epoch, Hostname: m.Hostname, Boot: m.Boot, Fingerprint: m.Fingerprint,
		Slow: m.Slow, Lost: m.Lost, Leaving: m.Leaving,
	}
	if m.Address.IsValid() {
		w.Address = m.Address.String()
	}
	if !m.Since.IsZero() {
		w.SinceUnixMs = m.Since.UnixMilli()
	}
	return w
}

// ToMember reads a member; an unknown state counts as possible.
func (w *Member) ToMember() cluster.Member {
	m := cluster.Member{
		ID: int(w.Id), State: cluster.Possible, Epoch: w.Epoch, Hostname: w.Hostname, Boot: w.Boot, Fingerprint: w.Fingerprint,
		Slow: w.Slow, Lost: w.Lost, Leaving: w.Leaving,
	}
	m.Address, _ = netip.ParseAddr(w.Address)
	if w.SinceUnixMs != 0 {
		m.Since = time.UnixMilli(w.SinceUnixMs)
	}
	for state, number := range states {
		if number == w.State {
			m.State = state
		}
	}
	return m
}
