package pid1

import (
	"fmt"

	"krgimage/node/bootlog"
	"krgimage/node/control"
	"krgimage/node/supervise"
)

// Handle carries out a request of `krg`; it is part of control.Machine.
func (m *machine) Handle(r control.Request) (control.Answer, error) {
	switch r.Command {
	case "poweroff":
		m.wish(bootlog.StagePoweroff, "krg poweroff")
	case "reboot":
		m.wish(bootlog.StageReboot, "krg reboot")
	case "status":
		var a control.Answer
		if u := m.unit.Load(); u != nil {
			a.Services = []supervise.Status{u.Status()}
		}
		return a, nil
	case "log":
		u := m.unit.Load()
		if u == nil || r.Service != "" && r.Service != u.Status().Name {
			return control.Answer{}, fmt.Errorf("no service %q", r.Service)
		}
		text, end := u.Log().Since(r.After)
		return control.Answer{Log: string(text), LogEnd: end}, nil
	default:
		return control.Answer{}, fmt.Errorf("unknown command %q", r.Command)
	}
	return control.Answer{}, nil
}
