package trial

import (
	"cmp"
	"net/netip"
	"slices"
	"time"
)

// Report is the state of a trial.
type Report struct {
	PID     int          `json:"pid"` // of the process that runs the trial
	Started time.Time    `json:"started"`
	Accel   Accel        `json:"accelerator"`
	UEFI    bool         `json:"uefi"`
	Head    netip.Prefix `json:"head"`
	Nodes   []NodeReport `json:"nodes"`
}

// NodeReport is the state of one machine.
type NodeReport struct {
	ID       int        `json:"id"`
	Hostname string     `json:"hostname"`
	MAC      string     `json:"mac"`
	Address  netip.Addr `json:"address"`
	SSH      string     `json:"ssh"` // loopback address and port, e.g. 127.0.0.1:2201
	PID      int        `json:"pid,omitempty"`
	Stage    string     `json:"stage"`
	Detail   string     `json:"detail,omitempty"`
	// Seconds from power-on (or the last reset) until the stage was reached.
	Seconds float64 `json:"seconds"`
	// Stages is the whole boot.
	Stages  []StageTime `json:"stages"`
	Console string      `json:"console"` // unix socket of the serial line
	Log     string      `json:"log"`     // file with all that came over it
	Link    bool        `json:"link"`    // the cable is plugged in

	powered time.Time
}

// StageTime is one stage of a boot.
type StageTime struct {
	Stage   string  `json:"stage"`
	Seconds float64 `json:"seconds"` // from power-on
	Detail  string  `json:"detail,omitempty"`
}

// SSHHost is the host part of SSH.
func (n NodeReport) SSHHost() string {
	a, err := netip.ParseAddrPort(n.SSH)
	if err != nil {
		return ""
	}
	return a.Addr().String()
}

// SSHPort is the port of SSH.
func (n NodeReport) SSHPort() int {
	a, _ := netip.ParseAddrPort(n.SSH)
	return int(a.Port())
}

// Settled says whether nothing more will happen to the machine by itself.
func (n NodeReport) Settled() bool {
	switch n.Stage {
	case "ready", "failed", "off", "crashed":
		return true
	}
	return false
}

// merge works out a machine's stage from its power and its boot. A boot that
// the head saw before the last power-on is the one before.
func merge(n NodeReport, w power, b Boot) NodeReport {
	n.PID, n.powered, n.Stages = w.pid, w.since, []StageTime{}
	if w.since.IsZero() {
		n.Stage = "waiting"
		return n
	}
	n.Stages = append(n.Stages, StageTime{Stage: "firmware"})
	events := slices.Clone(b.Events)
	slices.SortStableFunc(events, func(a, b Event) int { return cmp.Compare(a.At.UnixNano(), b.At.UnixNano()) })
	for _, e := range events {
		if !e.At.Before(w.since) {
			n.Stages = append(n.Stages, StageTime{e.Stage, e.At.Sub(w.since).Seconds(), e.Detail})
		}
	}
	last := n.Stages[len(n.Stages)-1]
	n.Stage, n.Seconds, n.Detail = last.Stage, last.Seconds, last.Detail
	switch {
	case w.crash != "":
		n.Stage, n.Detail = "crashed", w.crash
	case w.pid == 0:
		n.Stage, n.Detail = "off", ""
	}
	return n
}
