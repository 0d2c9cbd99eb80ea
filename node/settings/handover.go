package settings

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"krgimage/node/bootlog"
	"krgimage/node/cmdline"
	"krgimage/node/lease"
	"krgimage/node/nfsclient"
)

// Paths on a node. RunDir is a tmpfs of the host part; SharedDir is the part of
// it that the container sees, as /run/krg.
const (
	RunDir    = "/run/krg"
	RootMount = RunDir + "/root" // the NFS root, read-write
	Binary    = RunDir + "/krg"  // the krg that runs: in memory, so that it needs no file server
	SharedDir = RunDir + "/node"
	IDDir     = RunDir + "/identity" // the node's key and certificate

	handoverFile = "boot.json"
	settingsFile = "settings.json"

	// Names in SharedDir, which the container sees as its /run/krg. The shared
	// root has links to ResolvConf and MachineID.
	NodeFile      = "node.json"
	ControlSocket = "control.sock"
	ResolvConf    = "resolv.conf"
	MachineID     = "machine-id"
)

// Handover is all that stage 1 knows when it makes krg on the root PID 1.
type Handover struct {
	Identity cmdline.Identity `json:"identity"`
	Hostname string           `json:"hostname"`
	Domain   string           `json:"domain,omitempty"`
	Lease    lease.Lease      `json:"lease"`
	NFS      string           `json:"nfs"` // SERVER:PATH
	Root     nfsclient.Mount  `json:"root"`
	Image    Image            `json:"image"`
	Shares   []Share          `json:"shares,omitempty"` // besides the root

	Settings *Settings       `json:"settings,omitempty"` // nil: the head has no node interface
	Received time.Duration   `json:"received,omitempty"` // uptime at which Settings came
	Pending  []bootlog.Stage `json:"pending,omitempty"`
}

// Share is a directory that the container has besides the root.
type Share struct {
	At  string          `json:"at"`
	NFS nfsclient.Mount `json:"nfs"`
}

// Image is /etc/krgimage/image.json of the root.
type Image struct {
	Name          string `json:"name"`
	Version       string `json:"version"`
	KrgSHA256     string `json:"krg_sha256"`
	KernelRelease string `json:"kernel_release"`
	BuildID       string `json:"build_id"`
}

// RescueShell reports whether a shell may be offered on the node's console:
// yes, unless the head says no. An image that should never offer one carries
// no shell in its initramfs.
func (h Handover) RescueShell() bool { return h.Settings == nil || h.Settings.RescueShell }

// Save writes the handover and the head's settings to dir.
func (h Handover) Save(dir string) error {
	if err := writeJSON(filepath.Join(dir, handoverFile), h, 0o600); err != nil {
		return err
	}
	if h.Settings == nil {
		return nil
	}
	return writeJSON(filepath.Join(dir, settingsFile), h.Settings, 0o644)
}

// LoadHandover reads what Save wrote.
func LoadHandover(dir string) (Handover, error) {
	var h Handover
	return h, readJSON(filepath.Join(dir, handoverFile), &h)
}

// Node is what `krg node` shows: who this node is, for anyone on it.
type Node struct {
	SessionID int      `json:"session_id"`
	NodeID    int      `json:"node_id"`
	Hostname  string   `json:"hostname"`
	Domain    string   `json:"domain,omitempty"`
	Interface string   `json:"interface,omitempty"`
	MAC       string   `json:"mac,omitempty"`
	Addresses []string `json:"addresses"` // with prefix length
	Head      string   `json:"head,omitempty"`
	Root      string   `json:"root"` // SERVER:PATH
	Image     Image    `json:"image"`
	Kernel    string   `json:"kernel"`
}

// Save writes the node file to dir.
func (n Node) Save(dir string) error { return writeJSON(filepath.Join(dir, NodeFile), n, 0o644) }

// LoadNode reads the node file of the node this runs on, in the host part or
// in the container.
func LoadNode() (Node, error) {
	var n Node
	err := readJSON(filepath.Join(SharedDir, NodeFile), &n)
	if os.IsNotExist(err) {
		err = readJSON(filepath.Join(RunDir, NodeFile), &n)
	}
	if os.IsNotExist(err) {
		return n, fmt.Errorf("this machine isn't a running node: %w", err)
	}
	return n, err
}

func writeJSON(file string, v any, mode os.FileMode) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	tmp := file + ".new"
	if err := os.WriteFile(tmp, append(text, '\n'), mode); err != nil {
		return err
	}
	return os.Rename(tmp, file)
}

func readJSON(file string, v any) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, v); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return nil
}
