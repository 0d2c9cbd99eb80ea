package tftp

import (
	"net/netip"
	"strings"

	"krgimage/configs"
	"krgimage/pxe/nodes"
)

// Table says which files there are.
type Table struct {
	// Files by name.
	Files map[string]File
	// PXELinux returns the configuration of a machine, for
	// pxelinux.cfg/01-<mac>. Nil: there is none.
	PXELinux func(configs.MAC) ([]byte, bool)
	// PXELinuxDefault returns the configuration of the machine with this leased
	// address, for pxelinux.cfg/default. Nil: there is none.
	PXELinuxDefault func(client netip.Addr) ([]byte, bool)
}

const pxelinuxDir = "pxelinux.cfg/"

// Lookup is made for Config.Lookup.
func (t *Table) Lookup(name string, client netip.Addr) (File, bool) {
	if f, ok := t.Files[name]; ok {
		return f, true
	}
	rest, ok := strings.CutPrefix(name, pxelinuxDir)
	if !ok {
		return File{}, false
	}
	var data []byte
	ok = false
	if mac, isMAC := pxelinuxMAC(rest); isMAC && t.PXELinux != nil {
		data, ok = t.PXELinux(mac)
	} else if rest == "default" && t.PXELinuxDefault != nil {
		data, ok = t.PXELinuxDefault(client)
	}
	return File{Data: data, Stage: nodes.StageScript}, ok
}

// pxelinuxMAC reads 01-52-54-00-00-00-01: the hardware type of Ethernet and the
// address, in lower case.
func pxelinuxMAC(s string) (configs.MAC, bool) {
	rest, ok := strings.CutPrefix(s, "01-")
	if !ok || len(rest) != len("52-54-00-00-00-01") {
		return "", false
	}
	mac := configs.MAC(strings.ReplaceAll(rest, "-", ":"))
	hw := mac.HardwareAddr()
	return mac, len(hw) == 6 && hw.String() == string(mac)
}
