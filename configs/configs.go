// Package configs is the typed configuration of a cluster: one file,
// cluster.yaml, that `krgimage init` writes and every other command reads.
//
// Reading goes in four steps: the YAML tree is decoded over the defaults
// (strictly: unknown and repeated fields are errors), then the fields that
// follow from others are derived (addresses, ids, host names), then everything
// is validated. All findings of all steps are reported at once, each with
// file:line:column, the field and what to do.
//
// The package knows nothing of how the values are used and imports nothing of
// this module.
package configs

import (
	"net/netip"
	"strconv"
)

// MaxNodeID is the highest node id: Kerrighed's id space with automatic ids is
// 0..255, because an automatic id is the last byte of an IPv4 address.
const MaxNodeID = 255

// Cluster is the whole of cluster.yaml.
type Cluster struct {
	Name      string    `yaml:"name" json:"name" jsonschema:"description=Name of the cluster: a DNS label. It is the domain of the nodes and the container's host name prefix."`
	SessionID int       `yaml:"session_id" json:"session_id" jsonschema:"minimum=1,maximum=9999,description=Kerrighed session id (1..9999). Clusters with different ids on one link ignore each other."`
	Debian    Debian    `yaml:"debian" json:"debian"`
	Kernel    Kernel    `yaml:"kernel" json:"kernel"`
	Initramfs Initramfs `yaml:"initramfs" json:"initramfs"`
	Network   Network   `yaml:"network" json:"network"`
	Boot      Boot      `yaml:"boot" json:"boot"`
	NFSRoot   NFSRoot   `yaml:"nfsroot" json:"nfsroot"`
	Nodes     Nodes     `yaml:"nodes" json:"nodes"`
	Cluster   Service   `yaml:"cluster" json:"cluster"`
	Users     []User    `yaml:"users" json:"users" jsonschema:"description=Accounts of the container besides root. Each gets a home directory on the shared root."`
	SSH       SSH       `yaml:"ssh" json:"ssh"`
	Trial     Trial     `yaml:"trial" json:"trial"`
}

// Debian says which Debian the shared root is made of.
type Debian struct {
	Suite      string   `yaml:"suite" json:"suite" jsonschema:"description=Debian suite of the root and the kernel."`
	Mirror     string   `yaml:"mirror" json:"mirror" jsonschema:"description=Package mirror (http or https URL)."`
	Security   string   `yaml:"security_mirror" json:"security_mirror" jsonschema:"description=Mirror of the security updates; an empty string leaves them out."`
	Components []string `yaml:"components" json:"components" jsonschema:"enum=main,enum=contrib,enum=non-free,enum=non-free-firmware,description=Archive components."`
	Packages   []string `yaml:"packages" json:"packages" jsonschema:"description=Packages to install besides the base set."`
}

// Kernel chooses the signed Debian kernel and its command line.
type Kernel struct {
	Flavour string   `yaml:"flavour" json:"flavour" jsonschema:"description=Flavour of the signed kernel: the package is linux-image-FLAVOUR.,enum=amd64,enum=cloud-amd64,enum=rt-amd64"`
	Args    []string `yaml:"args" json:"args" jsonschema:"description=Arguments added to the kernel command line of every node."`
}

// Initramfs says what stage 1 carries.
type Initramfs struct {
	Modules     []string `yaml:"modules" json:"modules" jsonschema:"description=Kernel modules to carry besides the built-in list of network drivers and file systems; dependencies and firmware follow."`
	Firmware    []string `yaml:"firmware" json:"firmware" jsonschema:"description=Debian firmware packages (from non-free-firmware) to look in for the files that the carried modules name."`
	RescueShell bool     `yaml:"rescue_shell" json:"rescue_shell" jsonschema:"description=Offer a root shell on a node's own console when it can't boot. The console is the machine's keyboard or serial line: never the network."`
}

// Network is the boot network: one IPv4 subnet with the head node in it.
type Network struct {
	Interface string       `yaml:"interface" json:"interface" jsonschema:"description=The head node's network interface for 'krgimage serve'. Empty: the one that holds the head address."`
	Subnet    netip.Prefix `yaml:"subnet" json:"subnet" jsonschema:"description=IPv4 subnet of the nodes. By default node N has the address SUBNET+N\\, so that Kerrighed's automatic ids and the table agree."`
	Head      netip.Addr   `yaml:"head" json:"head" jsonschema:"description=Address of the head node in the subnet. Empty: the subnet's last usable address."`
	Gateway   netip.Addr   `yaml:"gateway" json:"gateway" jsonschema:"description=Default router handed to the nodes. Empty: none."`
	DNS       []netip.Addr `yaml:"dns" json:"dns" jsonschema:"description=Name servers handed to the nodes."`
	HTTPPort  int          `yaml:"http_port" json:"http_port" jsonschema:"minimum=1,maximum=65535,description=TCP port of the boot files and the node interface."`
	NFSPort   int          `yaml:"nfs_port" json:"nfs_port" jsonschema:"minimum=1,maximum=65535,description=TCP port of NFS and MOUNT."`

	ClusterPort int `yaml:"cluster_port" json:"cluster_port" jsonschema:"minimum=1,maximum=65535,description=TCP port of the head node where the nodes report and take orders (TLS)."`
	LinkPort    int `yaml:"link_port" json:"link_port" jsonschema:"minimum=1,maximum=65535,description=TCP port of every node for the other nodes (TLS)."`

	Lease Duration `yaml:"lease" json:"lease" jsonschema:"description=DHCP lease time."`
}

// Boot tunes the PXE chain.
type Boot struct {
	BIOS  string `yaml:"bios" json:"bios" jsonschema:"description=Loader for BIOS clients: ipxe (kernel by HTTP) or pxelinux (the classic way: kernel by TFTP).,enum=ipxe,enum=pxelinux"`
	Chain string `yaml:"chain" json:"chain" jsonschema:"description=auto: a firmware that is an iPXE with HTTP gets the boot script at once. always: every firmware loads our iPXE by TFTP first (for boards with a broken built-in iPXE).,enum=auto,enum=always"`
}

// NFSRoot says where the nodes' root lives: on the head node, or on a server
// that exists already.
type NFSRoot struct {
	Server  netip.Addr `yaml:"server" json:"server" jsonschema:"description=Address of an existing NFS server (version 3) that has the nodes' root. Empty: the head node serves it."`
	Path    string     `yaml:"path" json:"path" jsonschema:"example=/export/krg,description=Directory on that server. Without 'mounted' it is the root itself\\, with it the directory of roots that krgimage keeps."`
	Port    int        `yaml:"port" json:"port" jsonschema:"minimum=1,maximum=65535,description=TCP port of that server's NFS. Its MOUNT is looked for there first and then by its portmapper."`
	Options []string   `yaml:"options" json:"options" jsonschema:"description=NFS mount options of the nodes besides krgimage's own\\, for example mountport=20048."`
	Mounted string     `yaml:"mounted" json:"mounted" jsonschema:"description=Where that directory is on this machine. Build and serve keep the root there up to date. Empty: unpack the file of 'krgimage export rootfs' on the server."`
	Exports []Export   `yaml:"exports" json:"exports" jsonschema:"description=Further directories of the head node that every node mounts."`
}

// External reports whether an existing server has the root.
func (r NFSRoot) External() bool { return r.Server.IsValid() }

// Export is a directory of the head node besides the root.
type Export struct {
	Path     string `yaml:"path" json:"path" jsonschema:"required,example=/srv/home,description=Directory of the head node."`
	At       string `yaml:"at" json:"at" jsonschema:"required,example=/home,description=Where the nodes have it."`
	ReadOnly bool   `yaml:"readonly" json:"readonly" jsonschema:"description=Nodes can't change it."`
	Squash   string `yaml:"squash" json:"squash" jsonschema:"description=none: root of a node is root there\\, too. root: it acts as nobody.,enum=none,enum=root"`
}

// Nodes is the node table and the policy for machines that are not in it.
type Nodes struct {
	Unknown string   `yaml:"unknown" json:"unknown" jsonschema:"description=What to do with a MAC that is not in the table: discover (give it the lowest free id and keep it) or refuse or manual (let it wait for 'krgimage nodes admit').,enum=discover,enum=refuse,enum=manual"`
	IDs     []string `yaml:"discover_ids" json:"discover_ids" jsonschema:"description=Node ids that discovery may hand out: a list of N or N-M. Default: every id whose address is free."`
	Table   []Node   `yaml:"table" json:"table" jsonschema:"description=Known machines."`
}

// Node is one row of the node table. Only MAC and ID are needed.
type Node struct {
	MAC      MAC        `yaml:"mac" json:"mac" jsonschema:"required,example=52:54:00:4b:52:01,description=Ethernet address of the interface that boots."`
	ID       int        `yaml:"id" json:"id" jsonschema:"required,minimum=0,maximum=255,example=1,description=Kerrighed node id 0..255."`
	Hostname string     `yaml:"hostname" json:"hostname" jsonschema:"description=Host name; default: NAME-ID."`
	Address  netip.Addr `yaml:"address" json:"address" jsonschema:"description=IPv4 address in the subnet; default: SUBNET+ID."`
}

// Service is the cluster service of the head node.
type Service struct {
	Start string `yaml:"start" json:"start" jsonschema:"description=Which nodes join by themselves when they have booted: all or none (but for the first) or a number (of nodes that join in one step)."`
	Store Store  `yaml:"store" json:"store"`
}

// Total is the number of nodes of Start; 0 if it is a word.
func (s Service) Total() int {
	n, err := strconv.Atoi(s.Start)
	if err != nil {
		return 0
	}
	return n
}

// Store says where the cluster's shared state is kept.
type Store struct {
	Kind  string   `yaml:"kind" json:"kind" jsonschema:"description=embedded: in this head node alone. heads: in several head nodes together. etcd: in an etcd that is there already.,enum=embedded,enum=heads,enum=etcd"`
	Name  string   `yaml:"name" json:"name" jsonschema:"description=With heads: which of them this one is."`
	Heads []Head   `yaml:"heads" json:"heads" jsonschema:"description=With heads: all of them\\, three or five."`
	URLs  []string `yaml:"urls" json:"urls" jsonschema:"description=With etcd: its members\\, https://HOST:PORT."`
	CA    string   `yaml:"ca" json:"ca" jsonschema:"description=PEM file of the authorities that the other ends' certificates are signed by."`
	Cert  string   `yaml:"cert" json:"cert" jsonschema:"description=PEM file of this head's own certificate."`
	Key   string   `yaml:"key" json:"key" jsonschema:"description=PEM file of its key."`
}

// Head is one of several head nodes.
type Head struct {
	Name string `yaml:"name" json:"name" jsonschema:"required,example=a,description=Name of the head among the heads."`
	URL  string `yaml:"url" json:"url" jsonschema:"required,example=https://192.0.2.1:7473,description=Where the other heads reach it: https://ADDRESS:PORT\\, not on the boot network."`
}

// User is an account of the container.
type User struct {
	Name  string   `yaml:"name" json:"name" jsonschema:"required,example=alice,description=Login name."`
	UID   int      `yaml:"uid" json:"uid" jsonschema:"required,minimum=1000,maximum=59999,example=1001,description=Numeric user id and group id (1000..59999)."`
	Shell string   `yaml:"shell" json:"shell" jsonschema:"description=Login shell; default: /bin/bash."`
	Keys  []string `yaml:"keys" json:"keys" jsonschema:"description=Public keys of this user besides ssh.keys."`
}

// SSH says who gets in.
type SSH struct {
	Keys          []string `yaml:"keys" json:"keys" jsonschema:"description=Public keys (authorized_keys lines) that may log in as root and as every user."`
	PasswordLogin bool     `yaml:"password_login" json:"password_login" jsonschema:"description=Let users log in with a password. Root never can."`
}

// Trial sizes the QEMU nodes of `krgimage trial`.
type Trial struct {
	Nodes  int  `yaml:"nodes" json:"nodes" jsonschema:"minimum=1,maximum=64,description=Number of QEMU nodes."`
	Memory Size `yaml:"memory" json:"memory" jsonschema:"description=Memory of a node\\, for example 512MiB."`
	CPUs   int  `yaml:"cpus" json:"cpus" jsonschema:"minimum=1,maximum=255,description=Virtual CPUs of a node."`
}
