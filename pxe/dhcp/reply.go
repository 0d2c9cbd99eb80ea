package dhcp

import (
	"net"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"

	"krgimage/pxe/nodes"
)

// Names of the loaders, by TFTP and below /boot/ by HTTP.
const (
	LoaderBIOS     = "undionly.kpxe" // uses the firmware's network driver
	LoaderBIOSFull = "ipxe.pxe"      // brings its own drivers
	LoaderEFI      = "snponly.efi"
	LoaderPXELinux = "pxelinux.0"
)

// loaders says what a firmware loads first. RFC 4578 has 7 and 9 the wrong way
// round (its erratum 4625), so firmwares send either for x86-64.
var loaders = map[iana.Arch]string{
	iana.INTEL_X86PC:     LoaderBIOS,
	iana.EFI_X86_64:      LoaderEFI,
	iana.EFI_BC:          LoaderEFI,
	iana.EFI_X86_64_HTTP: LoaderEFI,
}

// loaderFresh is how long an iPXE that asks counts as the one that was loaded
// from here, with boot.chain always. Longer than any TFTP transfer of a loader,
// shorter than a machine needs to boot and be reset.
const loaderFresh = 2 * time.Minute

// boot is what a client is told to load.
type boot struct {
	file   string // file name for TFTP, or a URL; "": nothing
	script bool   // file is the boot script
	class  string // option 60 of the reply
}

// bootFor picks the boot file.
func (s *Server) bootFor(c Client) boot {
	loader, supported := loaders[c.Arch]
	switch {
	case c.NotNetboot != "":
		return boot{}
	case c.HTTPBoot:
		if !supported {
			return boot{}
		}
		// The firmware takes an offer for HTTP boot only with its own class in it.
		return boot{file: s.headURL + "/boot/" + loader, class: classHTTP}
	case c.Arch == iana.INTEL_X86PC && s.boot.BIOS == "pxelinux":
		return boot{file: LoaderPXELinux}
	case c.IPXEHTTP && (s.boot.Chain != "always" || s.loaded(c)):
		return boot{file: s.headURL + "/boot.ipxe?mac=" + strings.ReplaceAll(string(c.MAC), ":", "-"), script: true}
	case c.IPXE && c.Arch == iana.INTEL_X86PC:
		// The UNDI of an iPXE ROM is slow to work through (0.6 MB/s in QEMU
		// against 10), and it's the firmware that boot.chain always distrusts.
		return boot{file: LoaderBIOSFull}
	case supported:
		return boot{file: loader}
	}
	return boot{}
}

// loaded says whether this iPXE is the one that came from here.
func (s *Server) loaded(c Client) bool {
	age, ok := s.nodes.LoaderAge(c.MAC)
	return ok && age < loaderFresh
}

// reply builds an OFFER or an ACK.
func (s *Server) reply(request *dhcpv4.DHCPv4, c Client, n nodes.Node, t dhcpv4.MessageType) *dhcpv4.DHCPv4 {
	lease := time.Duration(s.net.Lease)
	subnet := s.net.Subnet.Masked()
	mask := net.CIDRMask(subnet.Bits(), 32)
	r := s.answerTo(request, t)
	r.YourIPAddr = n.Address.AsSlice()
	r.ClientIPAddr = request.ClientIPAddr
	r.UpdateOption(dhcpv4.OptIPAddressLeaseTime(lease))
	r.UpdateOption(dhcpv4.OptRenewTimeValue(lease / 2))         // RFC 2131 §4.4.5: T1
	r.UpdateOption(dhcpv4.OptRebindingTimeValue(lease / 8 * 7)) // and T2
	r.UpdateOption(dhcpv4.OptSubnetMask(mask))
	r.UpdateOption(dhcpv4.OptBroadcastAddress(lastAddress(subnet.Addr().AsSlice(), mask)))
	r.UpdateOption(dhcpv4.OptHostName(n.Hostname))
	r.UpdateOption(dhcpv4.OptDomainName(s.domain))
	r.UpdateOption(dhcpv4.OptGeneric(OptionHeadURL, []byte(s.headURL)))
	if s.net.Gateway.IsValid() {
		r.UpdateOption(dhcpv4.OptRouter(s.net.Gateway.AsSlice()))
	}
	if len(s.net.DNS) > 0 {
		var servers []net.IP
		for _, a := range s.net.DNS {
			servers = append(servers, a.AsSlice())
		}
		r.UpdateOption(dhcpv4.OptDNS(servers...))
	}
	if c.NotNetboot == "" {
		s.addBoot(r, c)
	} else if s.root != "" {
		// For systems, not firmware: an iPXE would look what it can boot there.
		r.UpdateOption(dhcpv4.OptRootPath(s.root))
	}
	return r
}

// addBoot tells the client what to load. Option 60 "PXEClient" is never sent:
// without option 43 it makes UEFI firmware look for a boot server on port 4011
// and never start TFTP.
func (s *Server) addBoot(r *dhcpv4.DHCPv4, c Client) {
	b := s.bootFor(c)
	if b.file == "" {
		s.warn("arch/"+string(c.MAC), "the machine can't boot this cluster's image: no loader for its firmware (x86-64 BIOS and UEFI are served)", "mac", c.MAC, "firmware", c.String())
		return
	}
	r.ServerIPAddr = s.head.AsSlice()
	r.ServerHostName = s.head.String()
	r.BootFileName = b.file
	r.UpdateOption(dhcpv4.OptTFTPServerName(s.head.String()))
	r.UpdateOption(dhcpv4.OptBootFileName(b.file))
	if b.class != "" {
		r.UpdateOption(dhcpv4.OptClassIdentifier(b.class))
	}
	if c.IPXE {
		// Saves iPXE its wait for a proxy DHCP server that isn't there.
		r.UpdateOption(dhcpv4.OptGeneric(optionIPXE, []byte{ipxeNoProxyDHCP, 1, 1}))
	}
}

func (s *Server) nak(request *dhcpv4.DHCPv4, why string) *dhcpv4.DHCPv4 {
	r := s.answerTo(request, dhcpv4.MessageTypeNak)
	r.SetBroadcast() // RFC 2131 §4.3.2: the client has no address it may use
	r.UpdateOption(dhcpv4.OptMessage(why))
	return r
}

// answerTo is an empty answer of the given type. The client's identifier is
// repeated (RFC 6842) and so is the machine identifier, which PXE demands
// (option 97, PXE 2.1 table 2-1).
func (s *Server) answerTo(request *dhcpv4.DHCPv4, t dhcpv4.MessageType) *dhcpv4.DHCPv4 {
	return &dhcpv4.DHCPv4{
		OpCode:        dhcpv4.OpcodeBootReply,
		HWType:        request.HWType,
		TransactionID: request.TransactionID,
		Flags:         request.Flags,
		ClientHWAddr:  request.ClientHWAddr,
		ClientIPAddr:  net.IPv4zero,
		YourIPAddr:    net.IPv4zero,
		ServerIPAddr:  net.IPv4zero,
		GatewayIPAddr: net.IPv4zero,
		Options:       s.commonOptions(request, t),
	}
}

func (s *Server) commonOptions(request *dhcpv4.DHCPv4, t dhcpv4.MessageType) dhcpv4.Options {
	o := dhcpv4.OptionsFromList(
		dhcpv4.OptMessageType(t),
		dhcpv4.OptServerIdentifier(s.head.AsSlice()),
	)
	for _, code := range []dhcpv4.OptionCode{dhcpv4.OptionClientIdentifier, dhcpv4.OptionClientMachineIdentifier} {
		if v := request.Options.Get(code); len(v) > 0 && len(v) <= 64 {
			o.Update(dhcpv4.OptGeneric(code, v))
		}
	}
	return o
}

// lastAddress is a subnet's broadcast address.
func lastAddress(ip net.IP, mask net.IPMask) net.IP {
	last := make(net.IP, len(ip))
	for i := range ip {
		last[i] = ip[i] | ^mask[i]
	}
	return last
}
